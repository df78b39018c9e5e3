"""Bad input to a live server: a 4xx that names field, limit and value, and neighbours untouched.

Every bad body is sent while streams of other adapters and depths run in the batch; each of those
writes, again and again, exactly what it writes alone.
"""

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.live.asking import ask_async
from tests.live.process import (
    ADMIN_KEY,
    API_KEY,
    BASE,
    MAX_BODY_BYTES,
    MAX_LOGPROBS,
    MAX_MODEL_LEN,
    MAX_N,
    LiveServer,
)
from tests.parity.zoo import NUM_LAYERS, VOCAB_SIZE

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LAST_ID = str(VOCAB_SIZE - 1)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

# (fields of the body, the error's param, what its message holds: the limit and the value given)
BOTH: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"colour": 3}, "colour", ["unknown field"]),
    ({"model": None}, "model", ["string", "None"]),
    ({"model": 7}, "model", ["string", "7"]),
    ({"model": ""}, "model", ["1 character", "''"]),
    ({"max_tokens": "5"}, "max_tokens", ["integer", "'5'"]),
    ({"max_tokens": 1.5}, "max_tokens", ["integer", "1.5"]),
    ({"max_tokens": True}, "max_tokens", ["integer", "True"]),
    ({"max_tokens": -1}, "max_tokens", ["0", "-1"]),
    ({"max_tokens": 0}, "max_tokens", ["at least 1", "0"]),
    ({"max_tokens": MAX_MODEL_LEN}, "max_tokens", [str(MAX_MODEL_LEN)]),
    ({"max_tokens": 10**30}, "max_tokens", [str(MAX_MODEL_LEN), str(10**30)]),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", ["2", "3"]),
    ({"temperature": -0.1}, "temperature", ["0", "-0.1"]),
    ({"temperature": 1e-9}, "temperature", ["1e-06", "1e-09"]),
    ({"temperature": "hot"}, "temperature", ["number", "hot"]),
    ({"top_p": 0}, "top_p", ["greater than 0", "got 0"]),
    ({"top_p": 1.01}, "top_p", ["less than or equal to 1", "1.01"]),
    ({"top_p": -0.5}, "top_p", ["greater than 0", "-0.5"]),
    ({"top_k": -2}, "top_k", ["-1", "-2"]),
    ({"min_p": 1.5}, "min_p", ["1", "1.5"]),
    ({"seed": 2**63}, "seed", [str(2**63 - 1), str(2**63)]),
    ({"n": 0}, "n", ["1", "0"]),
    ({"n": MAX_N + 1}, "n", [f"limit of {MAX_N}", str(MAX_N + 1)]),
    ({"stop": ""}, "stop", ["1 character", "''"]),
    ({"stop": ["a", 3]}, "stop[1]", ["string", "3"]),
    ({"stop": ["x"] * 65}, "stop", ["64"]),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", [LAST_ID, str(VOCAB_SIZE)]),
    ({"presence_penalty": 2.5}, "presence_penalty", ["2", "2.5"]),
    ({"frequency_penalty": -3}, "frequency_penalty", ["-2", "-3"]),
    ({"repetition_penalty": 0}, "repetition_penalty", ["0.000001", "got 0"]),
    ({"repetition_penalty": 1e-300}, "repetition_penalty", ["0.000001", "1e-300"]),
    ({"logit_bias": {"x": 1}}, "logit_bias", [LAST_ID, "x"]),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", [LAST_ID, str(VOCAB_SIZE)]),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", ["100", "101"]),
    ({"prompt_logprobs": MAX_LOGPROBS + 1}, "prompt_logprobs", [str(MAX_LOGPROBS), "21"]),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", ["stream"]),
    ({"stream": "yes"}, "stream", ["boolean", "yes"]),
    ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
    ({"best_of": 2}, "best_of", ["not supported"]),
    ({"guided_regex": "a"}, "guided_regex", ["structured_outputs"]),
    ({"priority": 2**31}, "priority", [str(2**31 - 1), str(2**31)]),
    ({"user": 3}, "user", ["string", "3"]),
    ({"metadata": {"a": 1}}, "metadata.a", ["string", "1"]),
    ({"lora_depth": 3}, "lora_depth", ["0", "3"]),
    ({"lora_depth": "full"}, "lora_depth", ["0", "full"]),
    ({"model": f"{BASE}@2"}, "lora_depth", ["0", "2"]),
    ({"model": "plain", "lora_depth": -1}, "lora_depth", [str(NUM_LAYERS), "-1"]),
    ({"model": "plain", "lora_depth": 5}, "lora_depth", [str(NUM_LAYERS), "5"]),
    ({"model": "plain", "lora_depth": 2.0}, "lora_depth", ["integer", "2.0"]),
    ({"model": "plain", "lora_depth": "half"}, "lora_depth", ["auto", "full", "half"]),
    ({"model": "plain@5"}, "lora_depth", [str(NUM_LAYERS), "5"]),
    ({"model": "plain@deep"}, "model", ["integer", "deep"]),
    ({"model": "plain@3", "lora_depth": 2}, "lora_depth", ["3", "2"]),
    ({"response_format": {"type": "yaml"}}, "response_format.type", ["json_object", "yaml"]),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ["required"]),
    ({"structured_outputs": {}}, "structured_outputs", ["exactly one", "0"]),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", ["compiled"]),
    ({"structured_outputs": {"grammar": "begin: x"}}, "structured_outputs.grammar", ["compiled"]),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", ["schema"]),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ["1 item"]),
]
COMPLETIONS_ONLY: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"prompt": ""}, "prompt", ["empty"]),
    ({"prompt": []}, "prompt", ["empty"]),
    ({"prompt": ["a", ""]}, "prompt[1]", ["empty"]),
    ({"prompt": [[1], []]}, "prompt[1]", ["empty"]),
    ({"prompt": 3}, "prompt", ["list of token ids", "3"]),
    ({"prompt": [1, VOCAB_SIZE]}, "prompt", [LAST_ID, str(VOCAB_SIZE), "[1]"]),
    ({"prompt": [[1], [-1]]}, "prompt[1]", [LAST_ID, "-1"]),
    ({"prompt": [10**30]}, "prompt", [LAST_ID, str(10**30)]),
    ({"prompt": "a" * MAX_MODEL_LEN}, "prompt", [str(MAX_MODEL_LEN), str(MAX_MODEL_LEN + 1)]),
    ({"prompt": "a" * 1000, "max_tokens": 24}, "max_tokens", ["1001", "23", "24"]),
    ({"prompt": [1], "add_special_tokens": True}, "add_special_tokens", ["token ids"]),
    ({"logprobs": MAX_LOGPROBS + 1}, "logprobs", [str(MAX_LOGPROBS), "21"]),
    ({"suffix": "x"}, "suffix", ["not supported"]),
    ({"messages": []}, "messages", ["unknown field"]),
]
CHAT_ONLY: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"messages": []}, "messages", ["1 item"]),
    ({"messages": "hi"}, "messages", ["list", "hi"]),
    ({"messages": [{"role": "user"}]}, "messages[0].content", ["required"]),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages", ["Unknown role king"]),
    ({"messages": [{"role": "user", "content": "a" * 2000}]}, "messages", [str(MAX_MODEL_LEN)]),
    ({"top_logprobs": 2}, "top_logprobs", ["logprobs", "2"]),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", [str(MAX_LOGPROBS), "21"]),
    ({"max_completion_tokens": 5000}, "max_completion_tokens", [str(MAX_MODEL_LEN), "5000"]),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", ["3", "4"]),
    ({"echo": True}, "echo", ["not supported"]),
    ({"functions": []}, "functions", ["tools"]),
    ({"tools": [TOOL]}, "tool_choice", ["response template"]),
    ({"tool_choice": "required"}, "tool_choice", ["tools"]),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", ["tools"]),
]
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": BASE, "prompt": "hello"},
    CHAT: {"model": BASE, "messages": [{"role": "user", "content": "hi"}]},
}
FIELDS = [
    *[(COMPLETIONS, *case) for case in BOTH + COMPLETIONS_ONLY],
    *[(CHAT, *case) for case in BOTH + CHAT_ONLY],
]

JSON = {"content-type": "application/json"}
LARGE = json.dumps({"model": BASE, "prompt": "a" * MAX_BODY_BYTES}).encode()
DEEP = b'{"model": "tiny", "prompt": "a", "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 901

# (body, headers, status, the error's param, what its message holds)
RAW: list[tuple[bytes, dict[str, str], int, str | None, list[str]]] = [
    (b"", JSON, 400, None, ["JSON"]),
    (b'{"model": "tiny", "prompt": "a"', JSON, 400, None, ["JSON", "column"]),
    (b"[]", JSON, 400, None, ["dictionary"]),
    (b"null", JSON, 400, None, ["dictionary"]),
    (b'{"model": "tiny", "prompt": "\xff"}', JSON, 400, None, ["UTF-8", "0xff"]),
    (b'\xef\xbb\xbf{"model": "tiny", "prompt": "a"}', JSON, 400, None, ["JSON"]),
    (b'{"model": "tiny", "prompt": "\\ud800"}', JSON, 400, None, ["surrogate"]),
    (b'{"model": "tiny", "prompt": "a", "top_p": NaN}', JSON, 400, None, ["NaN"]),
    (b'{"model": "tiny", "prompt": "a", "top_p": 1e999}', JSON, 400, "top_p", ["finite"]),
    (b'{"model": "tiny", "prompt": "a", "n": 1, "n": 2}', JSON, 400, "n", ["more than once"]),
    (DEEP, JSON, 400, None, []),
    (b"[" * 60_000, JSON, 400, None, []),
    (b'{"model": "tiny", "prompt": "a"}', {"content-type": "text/plain"}, 400, None, ["plain"]),
    (LARGE, JSON, 413, None, [str(MAX_BODY_BYTES), str(len(LARGE))]),
    (b"{}", JSON | {"authorization": ""}, 401, None, ["API key"]),
    (b"{}", JSON | {"authorization": "Bearer wrong"}, 401, None, ["API key"]),
    (b"{}", JSON | {"authorization": API_KEY}, 401, None, ["API key"]),
    (b"{}", JSON | {"authorization": f"Bearer {ADMIN_KEY}"}, 401, None, ["API key"]),
]


def refusal_of(response: httpx.Response) -> dict[str, Any]:
    """The error, after a check that it has OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 600
    return error


NEIGHBOURS: list[dict[str, Any]] = [
    {"model": BASE, "prompt": "the first neighbour", "temperature": 0, "max_tokens": 40},
    {"model": "plain@1", "prompt": "the second neighbour", "seed": 1, "max_tokens": 25},
    {"model": "dora@3", "prompt": "the third neighbour", "seed": 2, "max_tokens": 32, "n": 2},
    {"model": "head", "prompt": "the fourth " * 4, "temperature": 0, "max_tokens": 30},
]


@pytest.fixture
def beside_neighbours(server: LiveServer, async_client: AsyncOpenAI, runner: asyncio.Runner) -> Any:
    """Send bodies one after the other while the neighbours stream; returns the responses."""

    async def send_all(bodies: list[tuple[str, bytes, dict[str, str]]]) -> list[httpx.Response]:
        wishes = [wish | {"stream": True} for wish in NEIGHBOURS]
        alone = [(await ask_async(async_client, "completions", wish)).texts for wish in wishes]
        started = 0
        all_started = asyncio.Event()
        is_over = asyncio.Event()

        async def neighbour(wish: dict[str, Any], texts: list[str]) -> int:
            nonlocal started
            started += 1
            if started == len(wishes):
                all_started.set()
            num_rounds = 0
            while not (is_over.is_set() and num_rounds):
                answer = await ask_async(async_client, "completions", wish)
                assert answer.texts == texts
                num_rounds += 1
            return num_rounds

        async def send() -> list[httpx.Response]:
            try:
                await all_started.wait()
                key = {"authorization": f"Bearer {API_KEY}"}
                async with httpx.AsyncClient(base_url=server.url, headers=key, timeout=60) as http:
                    return [
                        await http.post(path, content=body, headers=headers)
                        for path, body, headers in bodies
                    ]
            finally:
                is_over.set()

        responses, *_ = await asyncio.gather(
            send(), *(neighbour(wish, texts) for wish, texts in zip(wishes, alone, strict=True))
        )
        return responses

    return lambda bodies: runner.run(send_all(bodies))


def test_every_bad_field_is_refused_by_name_and_no_neighbour_notices(
    beside_neighbours: Any,
) -> None:
    bodies = [
        (path, json.dumps(GOOD[path] | fields).encode(), JSON) for path, fields, _, _ in FIELDS
    ]
    responses = beside_neighbours(bodies)
    wrong = []
    for (path, fields, param, in_message), response in zip(FIELDS, responses, strict=True):
        error = refusal_of(response)
        if (
            response.status_code != 400
            or error["type"] != "invalid_request_error"
            or error["param"] != param
            or not all(part in error["message"] for part in in_message)
        ):
            wrong.append((path, str(fields)[:100], response.status_code, error))
    assert wrong == []


def test_every_bad_body_is_refused_and_no_neighbour_notices(beside_neighbours: Any) -> None:
    responses = beside_neighbours([(COMPLETIONS, body, headers) for body, headers, *_ in RAW])
    wrong = []
    for (body, headers, status, param, in_message), response in zip(RAW, responses, strict=True):
        error = refusal_of(response)
        if (
            response.status_code != status
            or param not in (None, error["param"])
            or not all(part in error["message"] for part in in_message)
        ):
            wrong.append((body[:60], headers, response.status_code, error))
    assert wrong == []


def test_an_unknown_model_is_404_and_no_neighbour_notices(beside_neighbours: Any) -> None:
    names = [
        "nobody",
        "nobody@2",
        f"{BASE}:nobody",
        "PLAIN",
        "../plain",
        "plain/../plain",
        ".",
    ]
    bodies = [
        (path, json.dumps(good | {"model": name}).encode(), JSON)
        for name in names
        for path, good in GOOD.items()
    ]
    for (_, body, _), response in zip(bodies, beside_neighbours(bodies), strict=True):
        assert response.status_code == 404, body
        error = refusal_of(response)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_the_bodies_that_are_spoiled_here_are_good(http: httpx.Client) -> None:
    for path, body in GOOD.items():
        assert http.post(path, json=body | {"max_tokens": 1}).status_code == 200
