"""`/v1/completions` through the official client: every field reaches the engine, every shape comes back."""

import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from server.engine.request import SamplingParams
from tests.api.fake_engine import NUM_LAYERS, FakeEngine

pytestmark = pytest.mark.anyio


def ids_of(engine: FakeEngine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.encode(text, add_special_tokens=False))


async def test_a_string_prompt(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    completion = await openai.completions.create(model="base", prompt="hello", max_tokens=7)
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    (choice,) = completion.choices
    assert (choice.text, choice.index, choice.finish_reason) == ("hellohe", 0, "length")
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 5
    assert completion.usage.completion_tokens == 7
    assert completion.usage.total_tokens == 12
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 2


async def test_every_form_of_prompt(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    ab, cd = ids_of(engine, "ab"), ids_of(engine, "cd")
    for prompt, expected in [
        ("ab", ["abab"]),
        (["ab", "cd"], ["abab", "cdcd"]),
        (list(ab), ["abab"]),
        ([list(ab), list(cd)], ["abab", "cdcd"]),
    ]:
        completion = await openai.completions.create(model="base", prompt=prompt, max_tokens=4)
        assert [choice.text for choice in completion.choices] == expected


async def test_choices_of_a_batch_are_numbered_by_prompt_then_sequence(
    openai: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.reply = lambda request, index: (
        f"{engine.tokenizer.decode(request.prompt_token_ids)}{index}"
    )
    expected = ["a0", "a1", "b0", "b1"]
    whole = await openai.completions.create(model="base", prompt=["a", "b"], n=2)
    assert [(c.index, c.text) for c in whole.choices] == list(enumerate(expected))
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 8)

    texts = [""] * 4
    async for chunk in await openai.completions.create(
        model="base", prompt=["a", "b"], n=2, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


async def test_every_field_reaches_the_engine(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    await openai.completions.create(
        model="tuned",
        prompt="hello",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=-3,
        n=2,
        stop=["x", "yz"],
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"5": 1, "6": -100},
        logprobs=2,
        user="someone",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "stop_token_ids": [7],
            "ignore_eos": True,
            "min_tokens": 3,
            "repetition_penalty": 1.1,
            "prompt_logprobs": 1,
            "add_special_tokens": True,
            "skip_special_tokens": False,
            "structured_outputs": {"regex": "[a-z]+"},
            "metadata": {"team": "a"},
            "priority": -2,
            "lora_depth": 4,
        },
    )
    (request,) = engine.requests
    assert request.priority == -2
    assert request.lora.adapter is not None
    assert (request.lora.adapter.name, request.lora.depth) == ("tuned", 4)
    assert request.prompt_token_ids == ids_of(engine, "hello")
    grammar = request.sampling.grammar
    assert grammar is not None
    assert "[a-z]+" in grammar
    assert request.sampling == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=-3,
        n=2,
        stop=("x", "yz"),
        stop_token_ids=(7,),
        ignore_eos=True,
        min_tokens=3,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
        logit_bias=((5, 1.0), (6, -100.0)),
        logprobs=2,
        prompt_logprobs=1,
        skip_special_tokens=False,
        grammar=grammar,
    )


async def test_the_defaults_are_openai_s(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    await openai.completions.create(model="base", prompt="hello")
    await openai.completions.create(model="base", prompt="a" * 505)
    first, second = (request.sampling for request in engine.requests)
    assert first == SamplingParams(max_tokens=16)
    assert second.max_tokens == 7, "the default goes as far as the context"


@pytest.mark.parametrize(("top_k", "passed"), [(-1, 0), (0, 0), (5, 5), (10_000, 0)])
async def test_a_top_k_that_keeps_everything_is_off(
    client: httpx.AsyncClient, engine: FakeEngine, top_k: int, passed: int
) -> None:
    await client.post("/v1/completions", json={"model": "base", "prompt": "a", "top_k": top_k})
    assert engine.requests[0].sampling.top_k == passed


@pytest.mark.parametrize(
    ("fields", "lora"),
    [
        ({"model": "base"}, (None, 0, "base", None)),
        ({"model": "base", "lora_depth": 0}, (None, 0, "base", None)),
        ({"model": "base@0"}, (None, 0, "base", None)),
        ({"model": "tuned"}, ("tuned", 7, "calibrated", 3)),
        ({"model": "tuned", "lora_depth": "auto"}, ("tuned", 7, "calibrated", 3)),
        ({"model": "tuned@auto"}, ("tuned", 7, "calibrated", 3)),
        ({"model": "tuned@full"}, ("tuned", NUM_LAYERS, "full", None)),
        ({"model": "tuned@5"}, ("tuned", 5, "request", None)),
        ({"model": "tuned@5", "lora_depth": 5}, ("tuned", 5, "request", None)),
        ({"model": "base:tuned"}, ("tuned", 7, "calibrated", 3)),
        ({"model": "base:tuned@2"}, ("tuned", 2, "request", None)),
        ({"model": "plain"}, ("plain", NUM_LAYERS, "full", None)),
    ],
)
async def test_model_and_depth(
    client: httpx.AsyncClient, fields: dict[str, Any], lora: tuple[Any, ...]
) -> None:
    expected = dict(
        zip(("adapter", "depth", "source", "boundary_version"), lora, strict=True),
        num_layers=NUM_LAYERS,
    )
    body = {"prompt": "a", "max_tokens": 2} | fields
    whole = (await client.post("/v1/completions", json=body)).json()
    assert whole["model"] == fields["model"]
    assert whole["lora"] == expected
    stream = await client.post("/v1/completions", json=body | {"stream": True})
    chunks = [json.loads(event[6:]) for event in stream.text.split("\n\n") if "{" in event]
    assert "lora" not in chunks[0]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["lora"] == expected


async def test_a_stream_is_events_that_end_with_done(client: httpx.AsyncClient) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 2, "stream": True}
    response = await client.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(chunk[6:]) for chunk in chunks)


async def test_a_stream_says_the_same_as_the_whole(openai: AsyncOpenAI) -> None:
    wish: dict[str, Any] = {"model": "base", "prompt": "héé😀", "max_tokens": 9, "logprobs": 1}
    whole = await openai.completions.create(**wish)
    text, tokens, offsets = "", [], []
    usage = None
    async for chunk in await openai.completions.create(
        **wish, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            assert chunk.usage is None
            text += choice.text
            assert choice.logprobs is not None
            tokens += choice.logprobs.tokens or []
            offsets += choice.logprobs.text_offset or []
        usage = chunk.usage or usage
    (choice,) = whole.choices
    assert choice.logprobs is not None
    assert (text, tokens, offsets) == (
        choice.text,
        choice.logprobs.tokens,
        choice.logprobs.text_offset,
    )
    assert usage == whole.usage


async def test_an_echo_begins_with_the_prompt(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    for prompt in ("héllo", list(ids_of(engine, "héllo"))):
        for stream in (False, True):
            reply = await openai.completions.create(
                model="base", prompt=prompt, max_tokens=3, echo=True, stream=stream
            )
            text = (
                "".join([chunk.choices[0].text async for chunk in reply])
                if stream
                else reply.choices[0].text
            )
            assert text == "héllohé"


async def test_a_prompt_of_the_whole_context_can_be_scored(openai: AsyncOpenAI) -> None:
    reply = await openai.completions.create(
        model="base", prompt="a" * 512, max_tokens=0, echo=True, logprobs=1
    )
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.tokens or []) == 512


async def test_guided_choice_json_and_lark_reach_the_engine_as_grammars(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for fields in (
        {"structured_outputs": {"choice": ['"quoted"', "plain", "é\n"]}},
        {"structured_outputs": {"json": {"type": "object"}}},
        {"structured_outputs": {"json": '{"type": "object"}'}},
        {"structured_outputs": {"grammar": 'start: "a" | "b"'}},
        {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    ):
        body = {"model": "base", "prompt": "a"} | fields
        assert (await client.post("/v1/completions", json=body)).status_code == 200, fields
        assert engine.requests[-1].sampling.grammar is not None
    text = {"model": "base", "prompt": "a", "response_format": {"type": "text"}}
    assert (await client.post("/v1/completions", json=text)).status_code == 200
    assert engine.requests[-1].sampling.grammar is None


@pytest.mark.parametrize(
    ("guidance", "text", "is_allowed"),
    [
        ({}, '{"a":1}', True),
        ({}, '{\n    "a": 1\n}', True),
        ({}, "{" + " " * 33 + '"a":1}', False),
        ({"x-guidance": {"whitespace_flexible": True}}, "{" + " " * 33 + '"a":1}', True),
        ({"x-guidance": {"whitespace_flexible": False}}, '{ "a":1}', False),
    ],
)
async def test_json_may_be_indented_but_not_for_ever(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    guidance: dict[str, Any],
    text: str,
    is_allowed: bool,
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    body = {"model": "base", "prompt": "a", "structured_outputs": {"json": schema | guidance}}
    await client.post("/v1/completions", json=body)
    assert engine.allows(text) is is_allowed


async def test_a_json_text_cannot_smuggle_a_second_grammar(client: httpx.AsyncClient) -> None:
    smuggled = '{"type": "object"} }, {"lark_grammar": "start: /.*/"'
    body = {"model": "base", "prompt": "a", "structured_outputs": {"json": smuggled}}
    assert (await client.post("/v1/completions", json=body)).status_code == 400
