"""Scores of prompts and completions, in the shapes that evaluation harnesses and clients read."""

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


def harness_score(choice: dict[str, Any], num_context: int) -> tuple[float, bool]:
    """What lm-evaluation-harness's `local-completions` makes of a choice: it scores the tokens between
    the context and the one that was generated."""
    logprobs = choice["logprobs"]
    scored = slice(num_context, -1)
    is_greedy = all(
        token == max(top, key=top.__getitem__)
        for token, top in zip(
            logprobs["tokens"][scored], logprobs["top_logprobs"][scored], strict=True
        )
    )
    return sum(logprobs["token_logprobs"][scored]), is_greedy


async def test_a_harness_scores_continuations(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    prompts = [engine.tokenizer.encode(text) for text in ("context answer", "a bcd")]
    body = {
        "model": "base",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert harness_score(choices[0], 7) == (-0.5 * 7, False)
    assert harness_score(choices[1], 1) == (-0.5 * 4, False)


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_an_echo_with_logprobs_scores_the_prompt(
    client: httpx.AsyncClient, max_tokens: int
) -> None:
    body = {
        "model": "base",
        "prompt": "abc",
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
    }
    response = (await client.post("/v1/completions", json=body)).json()
    (choice,) = response["choices"]
    assert choice["text"] == "abc" + "a" * max_tokens
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "a"][: 3 + max_tokens],
        "text_offset": [0, 1, 2, 3][: 3 + max_tokens],
        "token_logprobs": [None, -0.5, -0.5, -0.5][: 3 + max_tokens],
        "top_logprobs": [
            None,
            {"c": -0.25, "b": -0.5},
            {"d": -0.25, "c": -0.5},
            {"b": -0.25, "a": -0.5},
        ][: 3 + max_tokens],
    }
    assert response["usage"]["completion_tokens"] == max_tokens


async def test_prompt_logprobs_have_vllm_s_shape(client: httpx.AsyncClient) -> None:
    body = {"model": "base", "prompt": "ab", "max_tokens": 0, "prompt_logprobs": 3}
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert sorted(second.values(), key=lambda entry: entry["rank"]) == [
        {"logprob": -0.25, "rank": 1, "decoded_token": "c"},
        {"logprob": -0.5, "rank": 2, "decoded_token": "b"},
        {"logprob": -1.0, "rank": 3, "decoded_token": "d"},
    ]


async def test_prompt_logprobs_hold_the_token_itself_beyond_the_most_likely(
    client: httpx.AsyncClient,
) -> None:
    body = {"model": "base", "prompt": "ab", "max_tokens": 0, "prompt_logprobs": 0}
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    (entry,) = choice["prompt_logprobs"][1].values()
    assert entry == {"logprob": -0.5, "rank": 2, "decoded_token": "b"}


async def test_echo_and_prompt_logprobs_may_ask_for_different_widths(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {
        "model": "base",
        "prompt": "ab",
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
        "prompt_logprobs": 3,
    }
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert engine.requests[0].sampling.prompt_logprobs == 3
    assert len(choice["prompt_logprobs"][1]) == 3
    assert choice["logprobs"]["top_logprobs"][1] == {"c": -0.25, "b": -0.5}


async def test_parts_of_a_character_stay_apart(client: httpx.AsyncClient) -> None:
    body = {"model": "base", "prompt": "é", "max_tokens": 2, "logprobs": 2}
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == "é"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2


async def test_an_echo_in_a_stream_waits_for_its_scores(
    openai: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.score_at = 2
    tokens: list[list[str]] = [[], []]
    texts = ["", ""]
    async for chunk in await openai.completions.create(
        model="base", prompt="abc", max_tokens=4, echo=True, logprobs=1, n=2, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert choice.logprobs is not None
            tokens[choice.index] += choice.logprobs.tokens or []
    assert texts == ["abcabca", "abcabca"]
    assert tokens == [list("abcabca"), list("abcabca")]


async def test_offsets_find_each_token_in_the_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    start = engine.tokenizer.bos_token_id
    for prompt in ("a😀b<|user|>c", [start, *engine.tokenizer.encode("a😀b"), start]):
        body = {"model": "base", "prompt": prompt, "max_tokens": 9, "logprobs": 0, "echo": True}
        (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
        logprobs = choice["logprobs"]
        whole = [
            (token, offset)
            for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
            if token in ("a", "b", "c")
        ]
        assert whole
        assert all(choice["text"][offset] == token for token, offset in whole)


@pytest.mark.parametrize("num_top", [None, 0, 2])
async def test_chat_logprobs(openai: AsyncOpenAI, engine: FakeEngine, num_top: int | None) -> None:
    engine.reply = lambda request, index: "né"
    wish: dict[str, Any] = {
        "model": "base",
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
    }
    if num_top is not None:
        wish["top_logprobs"] = num_top
    whole = await openai.chat.completions.create(**wish)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert [(entry.token, entry.bytes, entry.logprob) for entry in content] == [
        ("n", [110], -0.5),
        ("bytes:\\xc3", [0xC3], -0.5),
        ("bytes:\\xa9", [0xA9], -0.5),
    ]
    assert [top.token for top in content[0].top_logprobs] == ["o", "n"][: num_top or 0]
    streamed = []
    async for chunk in await openai.chat.completions.create(**wish, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == content


async def test_a_chat_s_prompt_can_be_scored(client: httpx.AsyncClient) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "hi"}],
        "prompt_logprobs": 1,
        "max_tokens": 0,
    }
    response = (await client.post("/v1/chat/completions", json=body)).json()
    assert response["prompt_logprobs"][0] is None
    assert len(response["prompt_logprobs"]) == response["usage"]["prompt_tokens"]
