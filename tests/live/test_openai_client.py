"""The official client, sync and async, against a live server: prompts, streams, models, errors."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.live.asking import Ask
from tests.live.conftest import OracleOf
from tests.live.process import (
    ADAPTERS,
    BASE,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    MAX_SCRAPES,
    metric,
    text_of,
)
from tests.parity.adapters import RANK
from tests.parity.zoo import BOS, NUM_LAYERS

LENGTH = 6
GREEDY: dict[str, Any] = {"model": "dora@3", "max_tokens": LENGTH, "temperature": 0}


def expected(oracle_of: OracleOf, *token_ids: int) -> str:
    """What PEFT writes after these tokens."""
    return text_of(oracle_of("dora").greedy(token_ids, LENGTH, 3).token_ids)


def test_every_form_of_prompt(ask: Ask, oracle_of: OracleOf) -> None:
    first, second = b"one fish", "zwei Fïsche".encode()
    answers = [expected(oracle_of, BOS, *prompt) for prompt in (first, second)]
    for prompt, texts in (
        (first.decode(), answers[:1]),
        ([first.decode(), second.decode()], answers),
        ([BOS, *first], answers[:1]),
        ([[BOS, *first], [BOS, *second]], answers),
    ):
        answer = ask.complete(**GREEDY, prompt=prompt)
        assert answer.texts == texts
        assert [told.finish_reason for told in answer.choices] == ["length"] * len(texts)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(texts) * LENGTH
        assert answer.usage.prompt_tokens == sum(
            1 + len(given) for given in (first, second)[: len(texts)]
        )


def test_choices_of_many_prompts_are_numbered_by_prompt(ask: Ask) -> None:
    wish: dict[str, Any] = {"model": "plain", "max_tokens": 5, "temperature": 1.5, "seed": 9}
    answer = ask.complete(**wish, prompt=["ab", "cd"], n=2)
    assert answer.texts[:2] == ask.complete(**wish, prompt="ab", n=2).texts
    assert answer.texts[2:] == ask.complete(**wish, prompt="cd", n=2).texts
    assert len(set(answer.texts)) == 4


def test_a_conversation_is_rendered_by_the_template(ask: Ask, oracle_of: OracleOf) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hällo"}]},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go on"},
    ]
    prompt = "system: be brief\nuser: hällo\nassistant: yes?\nuser: go on\nassistant: ".encode()
    answer = ask.chat(**GREEDY, messages=messages)
    assert answer.text == expected(oracle_of, *prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_long_prompt_is_prefilled_in_chunks_and_may_fill_the_context(ask: Ask) -> None:
    room = MAX_MODEL_LEN - 1
    answer = ask.complete(model="plain@1", prompt="ab" * (room // 2), max_tokens=1, temperature=0)
    assert answer.usage is not None
    assert answer.usage.total_tokens == MAX_MODEL_LEN


def test_a_character_of_many_tokens_is_streamed_whole(ask: Ask) -> None:
    choice = {"structured_outputs": {"choice": ["naïve 😀 ✓"]}}
    assert ask.complete(model=BASE, prompt="x", max_tokens=40, extra_body=choice).text == (
        "naïve 😀 ✓"
    )
    messages = [{"role": "user", "content": "x"}]
    assert ask.chat(model=BASE, messages=messages, max_tokens=40, extra_body=choice).text == (
        "naïve 😀 ✓"
    )


def test_usage_is_streamed_only_where_it_is_asked_for(client: OpenAI) -> None:
    wish: dict[str, Any] = {"prompt": "ab", "stream": True} | GREEDY
    plain = list(client.completions.create(**wish))
    asked = list(client.completions.create(**wish, stream_options={"include_usage": True}))
    declined = list(client.completions.create(**wish, stream_options={"include_usage": False}))
    assert len(plain) == len(declined) == len(asked) - 1
    assert all(chunk.usage is None for chunk in (*plain, *declined, *asked[:-1]))
    assert asked[-1].usage is not None
    assert asked[-1].usage.total_tokens == 3 + LENGTH
    for chunks in (plain, asked):
        assert [getattr(chunk, "lora", None) is None for chunk in chunks[: LENGTH - 1]] == [
            True
        ] * (LENGTH - 1)
        assert chunks[-1].lora["depth"] == 3  # type: ignore[attr-defined]


def test_models_are_listed_and_retrieved(
    client: OpenAI, async_client: AsyncOpenAI, runner: asyncio.Runner
) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert next(iter(cards)) == BASE
    assert cards.keys() >= {BASE, *ADAPTERS}
    assert (cards[BASE]["parent"], cards[BASE]["lora"]) == (None, None)
    for name in ADAPTERS:
        card = cards[name]
        assert (card["object"], card["parent"], card["max_model_len"]) == (
            "model",
            BASE,
            MAX_MODEL_LEN,
        )
        assert card["root"].endswith(name)
        assert card["lora"] == {
            "rank": RANK,
            "num_layers": NUM_LAYERS,
            "effective_max_depth": NUM_LAYERS,
            "calibrated_depth": None,
            "boundary_version": None,
            "allowed_max_depth": NUM_LAYERS,
        }
        assert client.models.retrieve(name).model_dump() == card
        assert runner.run(async_client.models.retrieve(name)).model_dump() == card

    async def listed() -> list[str]:
        return [card.id async for card in async_client.models.list()]

    assert runner.run(listed()) == list(cards)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/v1/embeddings", lambda c: c.embeddings.create(model=BASE, input="a")),
        ("/v1/responses", lambda c: c.responses.create(model=BASE, input="a")),
        ("/v1/moderations", lambda c: c.moderations.create(input="a")),
        ("/v1/images/generations", lambda c: c.images.generate(prompt="a")),
        ("/v1/audio/speech", lambda c: c.audio.speech.create(model="a", voice="b", input="c")),
        ("/v1/files", lambda c: c.files.list()),
        ("/v1/batches", lambda c: c.batches.list()),
        ("/v1/fine_tuning/jobs", lambda c: c.fine_tuning.jobs.list()),
        ("/v1/vector_stores", lambda c: c.vector_stores.list()),
    ],
)
def test_what_is_not_served_is_a_clean_404(
    client: OpenAI, path: str, call: Callable[[OpenAI], object]
) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        call(client)
    assert path in refusal.value.message
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.code == "not_found"


def test_a_method_that_a_route_does_not_take_is_a_clean_405(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refusal:
        client.models.delete("plain")
    assert refusal.value.status_code == 405
    assert "DELETE /v1/models/plain" in refusal.value.message


def test_the_client_raises_its_own_errors(ask: Ask) -> None:
    wish: dict[str, Any] = {"prompt": "a"} | GREEDY
    with pytest.raises(openai.BadRequestError) as refusal:
        ask.complete(**wish, best_of=2)
    assert (refusal.value.param, refusal.value.code) == ("best_of", "unsupported_field")
    assert "`n`" in refusal.value.message
    with pytest.raises(openai.BadRequestError) as refusal:
        ask.complete(**wish | {"temperature": -1})
    assert refusal.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        ask.complete(**wish | {"model": "nobody@2"})
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.AuthenticationError) as stranger:
        ask.complete(**wish, extra_headers={"authorization": "Bearer wrong"})
    assert stranger.value.code == "invalid_api_key"
    assert stranger.value.request_id


def test_the_routes_beside_v1(http: httpx.Client, client: OpenAI) -> None:
    text = "naïve <pad>"
    told = http.post("/tokenize", json={"prompt": text, "model": "plain@2"}).json()
    usage = client.completions.create(model=BASE, prompt=text, max_tokens=1).usage
    assert usage is not None
    assert told["count"] == len(told["tokens"]) == usage.prompt_tokens
    assert told["max_model_len"] == MAX_MODEL_LEN
    back = http.post("/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": f"<bos>{text}"}
    for path in ("/health", "/ready", "/version", "/metrics"):
        answer = httpx.get(f"{http.base_url}{path}")
        assert answer.status_code == 200, path


def test_an_urgent_request_overtakes_one_that_waits(
    async_client: AsyncOpenAI, runner: asyncio.Runner, http: httpx.Client
) -> None:
    create = async_client.completions.create
    # Sampled without a seed: an end token would free a seat that the waiting ones are to wait for.
    long: dict[str, Any] = {"model": BASE, "max_tokens": 900, "stream": True}
    long["extra_body"] = {"ignore_eos": True}
    finished: list[int] = []

    async def ask(priority: int) -> None:
        await create(model=BASE, prompt="ab", max_tokens=4, extra_body={"priority": priority})
        finished.append(priority)

    async def waiting(num: int) -> None:
        for _ in range(MAX_SCRAPES):
            if metric(http, "vllm:num_requests_waiting") == num:
                return
            await asyncio.sleep(0)
        pytest.fail(f"{num} requests never waited")

    async def play() -> None:
        seated = [await create(prompt=f"{i}", **long) for i in range(MAX_NUM_SEQS)]
        for stream in seated:
            await anext(aiter(stream))
        waiters = []
        for num, priority in enumerate((5, 0, -5), start=1):
            waiters.append(asyncio.create_task(ask(priority)))
            await waiting(num)
        await seated.pop().close()  # one place for three
        await asyncio.gather(*waiters)
        assert metric(http, "vllm:num_requests_running") >= 1, "the long ones ended by themselves"
        for stream in seated:
            await stream.close()

    runner.run(play())
    assert finished == [-5, 0, 5]
