"""Every bad input is an error in OpenAI's shape that names the field, its limit and the value given."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.config import Settings
from tests.api.conftest import MakeClient
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

COMPLETION: dict[str, Any] = {"model": "base", "prompt": "hello"}
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

VOCAB = 256 + 7 + 5
CONTEXT = 512

# (field or fields of the body, the error's param, what its message holds)
BOTH: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"colour": 3}, "colour", ["unknown field"]),
    ({"model": None}, "model", ["string"]),
    ({"model": 7}, "model", ["string", "7"]),
    ({"model": ""}, "model", ["1 character"]),
    ({"max_tokens": "5"}, "max_tokens", ["integer", "'5'"]),
    ({"max_tokens": 1.5}, "max_tokens", ["integer", "1.5"]),
    ({"max_tokens": True}, "max_tokens", ["integer", "True"]),
    ({"max_tokens": -1}, "max_tokens", ["0", "-1"]),
    ({"max_tokens": 0}, "max_tokens", ["at least 1", "0"]),
    ({"max_tokens": 5000}, "max_tokens", [str(CONTEXT), "5000"]),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", ["2", "3"]),
    ({"min_tokens": -1}, "min_tokens", ["0", "-1"]),
    ({"temperature": -0.1}, "temperature", ["0", "-0.1"]),
    ({"temperature": 1e-9}, "temperature", ["1e-06", "1e-09"]),
    ({"temperature": "hot"}, "temperature", ["number", "hot"]),
    ({"top_p": 0}, "top_p", ["greater than 0", "got 0"]),
    ({"top_p": 1.01}, "top_p", ["less than or equal to 1", "1.01"]),
    ({"top_k": -2}, "top_k", ["-1", "-2"]),
    ({"min_p": 1.5}, "min_p", ["1", "1.5"]),
    ({"min_p": -0.5}, "min_p", ["0", "-0.5"]),
    ({"seed": 2**63}, "seed", [str(2**63 - 1), str(2**63)]),
    ({"n": 0}, "n", ["1", "0"]),
    ({"n": 5}, "n", ["limit of 4", "5"]),
    ({"stop": ""}, "stop", ["1 character"]),
    ({"stop": ["a", ""]}, "stop[1]", ["1 character"]),
    ({"stop": 3}, "stop", ["string", "3"]),
    ({"stop": ["x"] * 65}, "stop", ["64"]),
    ({"stop_token_ids": [1, VOCAB]}, "stop_token_ids", [str(VOCAB - 1), str(VOCAB)]),
    ({"stop_token_ids": [-1]}, "stop_token_ids", ["0..", "-1"]),
    ({"presence_penalty": 2.5}, "presence_penalty", ["2", "2.5"]),
    ({"frequency_penalty": -3}, "frequency_penalty", ["-2", "-3"]),
    ({"repetition_penalty": 0}, "repetition_penalty", ["0", "got 0"]),
    ({"logit_bias": {"x": 1}}, "logit_bias", [str(VOCAB - 1), "x"]),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias", [str(VOCAB - 1), str(VOCAB)]),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", ["100", "101"]),
    ({"prompt_logprobs": 6}, "prompt_logprobs", ["5", "6"]),
    ({"prompt_logprobs": -1}, "prompt_logprobs", ["0", "-1"]),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", ["stream"]),
    ({"stream": "yes"}, "stream", ["boolean", "yes"]),
    ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
    (
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x",
        ["unknown field"],
    ),
    ({"best_of": 2}, "best_of", ["not supported"]),
    ({"use_beam_search": True}, "use_beam_search", ["not supported"]),
    ({"guided_json": {}}, "guided_json", ["structured_outputs"]),
    ({"priority": 2**31}, "priority", [str(2**31 - 1), str(2**31)]),
    ({"user": 3}, "user", ["string", "3"]),
    ({"metadata": {"a": 1}}, "metadata.a", ["string", "1"]),
    ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", ["16"]),
    ({"lora_depth": 3}, "lora_depth", ["0", "3"]),
    ({"model": "tuned", "lora_depth": 13}, "lora_depth", ["12", "13"]),
    ({"model": "tuned", "lora_depth": -1}, "lora_depth", ["0", "-1"]),
    ({"model": "tuned", "lora_depth": "half"}, "lora_depth", ["auto", "full", "half"]),
    ({"model": "tuned", "lora_depth": 2.0}, "lora_depth", ["integer", "2.0"]),
    ({"model": "tuned@13"}, "lora_depth", ["12", "13"]),
    ({"model": "tuned@half"}, "model", ["integer", "half"]),
    ({"model": "tuned@3", "lora_depth": 4}, "lora_depth", ["3", "4"]),
    ({"model": "tuned@full", "lora_depth": "auto"}, "lora_depth", ["full", "auto"]),
    ({"response_format": {"type": "yaml"}}, "response_format.type", ["json_object", "yaml"]),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        ["required"],
    ),
    (
        {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
        "response_format.json_schema",
        ["json_schema", "text"],
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "nonsense"}},
            }
        },
        "response_format.json_schema.schema",
        ["compiled", "nonsense"],
    ),
    ({"structured_outputs": {}}, "structured_outputs", ["exactly one", "0"]),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs",
        ["exactly one", "2"],
    ),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", ["compiled"]),
    ({"structured_outputs": {"grammar": "begin: x"}}, "structured_outputs.grammar", ["compiled"]),
    ({"structured_outputs": {"grammar": 'root ::= "a'}}, "structured_outputs.grammar", ["cannot"]),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", ["schema"]),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ["1 item"]),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", ["[1]", "empty"]),
    (
        {"structured_outputs": {"structural_tag": "x"}},
        "structured_outputs.structural_tag",
        ["not supported"],
    ),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        ["response_format"],
    ),
]

COMPLETIONS_ONLY: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"prompt": ""}, "prompt", ["empty"]),
    ({"prompt": []}, "prompt", ["empty"]),
    ({"prompt": [[]]}, "prompt", ["empty"]),
    ({"prompt": ["a", ""]}, "prompt[1]", ["empty"]),
    ({"prompt": [[1], []]}, "prompt[1]", ["empty"]),
    ({"prompt": None}, "prompt", ["string"]),
    ({"prompt": 3}, "prompt", ["list of token ids", "3"]),
    ({"prompt": {"text": "a"}}, "prompt", ["list of token ids"]),
    ({"prompt": [1, "a"]}, "prompt[1]", ["integer", "'a'"]),
    ({"prompt": ["a", 1]}, "prompt[1]", ["string", "1"]),
    ({"prompt": [True]}, "prompt[0]", ["integer", "True"]),
    ({"prompt": [[1], [2, 3.5]]}, "prompt[1][1]", ["integer", "3.5"]),
    ({"prompt": [1, VOCAB]}, "prompt", [str(VOCAB - 1), str(VOCAB), "[1]"]),
    ({"prompt": [[1], [-1]]}, "prompt[1]", ["0..", "-1"]),
    ({"prompt": "a" * 512}, "prompt", ["512"]),
    ({"prompt": "a" * 513, "max_tokens": 0, "echo": True}, "prompt", ["512", "513"]),
    ({"prompt": "a" * 500, "max_tokens": 13}, "max_tokens", ["512", "500", "12", "13"]),
    ({"prompt": [1], "add_special_tokens": True}, "add_special_tokens", ["token ids"]),
    ({"logprobs": 6}, "logprobs", ["5", "6"]),
    ({"logprobs": True}, "logprobs", ["integer", "True"]),
    ({"suffix": "x"}, "suffix", ["not supported"]),
    ({"messages": []}, "messages", ["unknown field"]),
]

CHAT_ONLY: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"messages": []}, "messages", ["1 item"]),
    ({"messages": "hi"}, "messages", ["list", "hi"]),
    ({"messages": [{"content": "a"}]}, "messages[0].role", ["required"]),
    ({"messages": [{"role": "user"}]}, "messages[0].content", ["required"]),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages", ["Unknown role king"]),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", ["string", "3"]),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", ["1 item"]),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url",
        ["text only"],
    ),
    (
        {"messages": [{"role": "user", "content": "a", "mood": "b"}]},
        "messages[0].mood",
        ["unknown field"],
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
                    ],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        ["JSON"],
    ),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages", ["512"]),
    ({"logprobs": 1}, "logprobs", ["boolean", "1"]),
    ({"top_logprobs": 2}, "top_logprobs", ["logprobs", "2"]),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", ["5", "6"]),
    ({"max_completion_tokens": 5000}, "max_completion_tokens", ["512", "5000"]),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", ["3", "4"]),
    ({"echo": True}, "echo", ["not supported"]),
    ({"functions": []}, "functions", ["tools"]),
    ({"reasoning_effort": "low"}, "reasoning_effort", ["not supported"]),
    ({"prompt": "a"}, "prompt", ["unknown field"]),
    ({"tools": []}, "tools", ["1 item"]),
    ({"tools": [{"type": "web"}]}, "tools[0].type", ["function", "web"]),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        ["64", "a b"],
    ),
    ({"tools": [TOOL]}, "tool_choice", ["response template"]),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice", ["response template"]),
    ({"tools": [TOOL, TOOL], "tool_choice": "required"}, "tools", ["look", "once"]),
    ({"tool_choice": "required"}, "tool_choice", ["tools"]),
    ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice", ["required", "perhaps"]),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", ["tools"]),
    (
        {
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "listen"}},
        },
        "tool_choice",
        ["listen", "look"],
    ),
    (
        {
            "tools": [TOOL],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "tool_choice",
        ["response_format"],
    ),
]

CASES = [
    *[("/v1/completions", COMPLETION | fields, p, m) for fields, p, m in BOTH + COMPLETIONS_ONLY],
    *[("/v1/chat/completions", CHAT | fields, p, m) for fields, p, m in BOTH + CHAT_ONLY],
]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, after a check that it has OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "in_message"),
    CASES,
    ids=[f"{path[4:8]}-{i}-{param}" for i, (path, _, param, _) in enumerate(CASES)],
)
async def test_a_bad_field_is_refused_by_name(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    body: dict[str, Any],
    param: str,
    in_message: list[str],
) -> None:
    response = await client.post(path, json=body)
    error = error_of(response)
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert all(part in error["message"] for part in in_message), error
    assert engine.requests == []


@pytest.mark.parametrize("body", [COMPLETION, CHAT])
async def test_the_table_starts_from_bodies_that_are_served(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    assert (await client.post(path, json=body)).status_code == 200


@pytest.mark.parametrize("model", ["nobody", "nobody@3", "base:nobody", "TUNED"])
async def test_an_unknown_model_is_404(client: httpx.AsyncClient, model: str) -> None:
    response = await client.post("/v1/completions", json=COMPLETION | {"model": model})
    error = error_of(response)
    assert response.status_code == 404
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("content", "in_message"),
    [
        (b'{"model": "base", "prompt": "a"', "JSON"),
        (b"", "JSON"),
        (b"[]", "dictionary"),
        (b'"text"', "dictionary"),
        (b'{"model": "base", "prompt": "\xff"}', "UTF-8"),
        (b'{"model": "base", "prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"model": "base", "prompt": "a", "temperature": Infinity}', "Infinity"),
        (b'{"model": "base", "prompt": "a", "temperature": -Infinity}', "-Infinity"),
        (b'{"model": "base", "prompt": "a", "temperature": 1e999}', "finite"),
        (b'{"model": "base", "prompt": "a", "seed": 1' + b"0" * 3000 + b"}", "seed"),
        (b'{"model": "base", "prompt": "a", "prompt": "b"}', "more than once"),
        (b'{"model": "base", "prompt": "\\ud800"}', "surrogate"),
        (b'{"model": "base", "prompt": "\\uDC00"}', "surrogate"),
        (b'{"a":' * 600 + b"1" + b"}" * 600, "unknown field"),
        (b"[" * 4000, "JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_body_that_is_no_strict_json_is_400(
    client: httpx.AsyncClient, content: bytes, in_message: str
) -> None:
    response = await client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    message = error_of(response)["message"]
    assert in_message in message or "nested too deeply" in message, message


@pytest.mark.parametrize(("depth", "status"), [(126, 200), (127, 400), (5000, 400), (30_000, 400)])
async def test_nesting_is_bounded(
    make_client: MakeClient, engine: FakeEngine, depth: int, status: int
) -> None:
    """In the body, two objects around it, and in a text that is JSON itself."""
    client = make_client(engine, Settings(max_body_bytes=1 << 20))
    schema = '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)
    body = json.dumps(COMPLETION | {"structured_outputs": {"json": 0}})
    response = await client.post(
        "/v1/completions",
        content=body.replace("0}", schema + "}"),
        headers={"content-type": "application/json"},
    )
    message = "" if response.status_code == 200 else error_of(response)["message"]
    assert ("nested too deeply" in message) == (status == 400), message
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a":' * depth}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    response = await client.post(
        "/v1/chat/completions", json={"model": "base", "messages": messages}
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages[0].tool_calls[0].function.arguments"


async def test_brackets_in_strings_are_no_nesting(client: httpx.AsyncClient) -> None:
    for text in ("[{" * 200, '\\"[[' * 200, "[" * 300 + '"'):
        assert (
            await client.post("/v1/completions", json=COMPLETION | {"prompt": text})
        ).status_code in (
            200,
            400,
        )
        response = await client.post("/tokenize", json={"prompt": text})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1, "a": 2}', "[1]"])
async def test_arguments_of_a_call_are_strict_json(
    client: httpx.AsyncClient, arguments: str
) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    response = await client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
    assert response.status_code == 400
    assert "arguments" in error_of(response)["param"]


async def test_a_body_that_does_not_come_is_408(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.body.BODY_TIMEOUT_S", 0.05)

    async def stalled():
        yield b'{"model": '
        await asyncio.sleep(30)

    response = await client.post(
        "/v1/completions", content=stalled(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 408
    assert error_of(response)["code"] == "body_timeout"


async def test_blank_lines_of_a_grammar_take_no_time(client: httpx.AsyncClient) -> None:
    grammar = 'root ::= "a"' + "\n" * 1500 + 'b ::= "c"'
    wish = COMPLETION | {"structured_outputs": {"grammar": grammar}}
    assert (await client.post("/v1/completions", json=wish)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/chat/completions/", "/tokenize/"])
async def test_a_path_with_a_slash_too_many_is_404(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json=COMPLETION)
    assert response.status_code == 404
    assert error_of(response)["type"] == "invalid_request_error"


async def test_a_surrogate_pair_is_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post(
        "/v1/completions",
        content=b'{"model": "base", "prompt": "\\ud83d\\ude00"}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200
    assert len(engine.requests[0].prompt_token_ids) == 4


async def test_a_body_must_say_that_it_is_json(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": "text/plain"}
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == "content-type"


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_over_the_limit_is_413(client: httpx.AsyncClient, is_chunked: bool) -> None:
    body = json.dumps(COMPLETION | {"prompt": "a" * 5000}).encode()

    async def parts():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    response = await client.post(
        "/v1/completions",
        content=parts() if is_chunked else body,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    assert "4096" in error_of(response)["message"]


async def test_a_body_at_the_limit_is_read(client: httpx.AsyncClient) -> None:
    body = json.dumps(COMPLETION).encode()
    response = await client.post(
        "/v1/completions",
        content=body + b" " * (4096 - len(body)),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200


async def test_a_long_value_is_cut_in_the_message(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=COMPLETION | {"stop": "x" * 2000})
    assert len(error_of(response)["message"]) < 300


@pytest.mark.parametrize("fields", [{"x" * 3000: 1}, {"logit_bias": {"x" * 3000: 1}}])
async def test_a_long_name_is_cut_in_the_message(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    response = await client.post("/v1/completions", json=COMPLETION | fields)
    assert response.status_code == 400
    assert len(response.content) < 600


async def test_null_says_the_same_as_leaving_out(client: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(
        ["max_tokens", "stop", "seed", "n", "logit_bias", "lora_depth", "best_of"]
    )
    assert (await client.post("/v1/completions", json=COMPLETION | nulls)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)]
)
async def test_the_framework_s_own_errors_have_the_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert path in error_of(response)["message"]
