"""Depth over HTTP: every adapter at every depth, at once, writes what PEFT writes at that depth."""

import asyncio
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.live.asking import WAYS, Ask, ask_async
from tests.live.conftest import OracleOf
from tests.live.process import ADAPTERS, BASE, BLOCK_SIZE, metric, text_of
from tests.parity.zoo import BOS, NUM_LAYERS

PROMPT = "The quick brown fox jumps over the lazy dog, twice."
NUM_TOKENS = 24


def test_every_depth_in_one_batch_writes_what_peft_writes(
    async_client: AsyncOpenAI, runner: asyncio.Runner, http: httpx.Client, oracle_of: OracleOf
) -> None:
    prompt = (BOS, *PROMPT.encode())
    expected: dict[str, str] = {
        BASE: text_of(oracle_of(None).greedy(prompt, NUM_TOKENS, 0).token_ids)
    }
    for adapter in ADAPTERS:
        for depth in (0, 1, NUM_LAYERS // 2, NUM_LAYERS):
            answer = oracle_of(adapter).greedy(prompt, NUM_TOKENS, depth)
            expected[f"{adapter}@{depth}"] = text_of(answer.token_ids)
    assert {expected[f"{adapter}@0"] for adapter in ADAPTERS} == {expected[BASE]}
    assert len(set(expected.values())) == 1 + 3 * len(ADAPTERS)
    wish: dict[str, Any] = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}

    async def ask_all() -> dict[str, str]:
        questions = [
            ask_async(async_client, "completions", wish | {"model": model, "stream": i % 2 == 1})
            for i, model in enumerate(expected)
        ]
        answers = await asyncio.gather(*questions)
        return {model: answer.text for model, answer in zip(expected, answers, strict=True)}

    num_steps = metric(http, "fathom_steps_total")
    assert runner.run(ask_all()) == expected
    num_steps = metric(http, "fathom_steps_total") - num_steps
    assert num_steps < len(expected) * NUM_TOKENS, "no step was shared"


@pytest.mark.parametrize(
    ("model", "field", "lora"),
    [
        ("tiny", None, (None, 0, "base")),
        ("tiny", 0, (None, 0, "base")),
        ("tiny@0", None, (None, 0, "base")),
        ("plain", None, ("plain", NUM_LAYERS, "full")),
        ("plain", "auto", ("plain", NUM_LAYERS, "full")),
        ("plain", "full", ("plain", NUM_LAYERS, "full")),
        ("plain", 0, ("plain", 0, "request")),
        ("plain", 3, ("plain", 3, "request")),
        ("plain@3", None, ("plain", 3, "request")),
        ("plain@3", 3, ("plain", 3, "request")),
        ("plain@auto", None, ("plain", NUM_LAYERS, "full")),
        ("tiny:plain", None, ("plain", NUM_LAYERS, "full")),
        ("tiny:plain@1", None, ("plain", 1, "request")),
    ],
)
def test_model_and_field_choose_adapter_and_depth(
    ask: Ask, oracle_of: OracleOf, model: str, field: Any, lora: tuple[str | None, int, str]
) -> None:
    adapter, depth, source = lora
    extra = {} if field is None else {"extra_body": {"lora_depth": field}}
    answer = ask.complete(model=model, prompt=PROMPT, max_tokens=8, temperature=0, **extra)
    expected = oracle_of(adapter).greedy((BOS, *PROMPT.encode()), 8, depth)
    assert answer.text == text_of(expected.token_ids)
    assert answer.lora == {
        "adapter": adapter,
        "depth": depth,
        "num_layers": NUM_LAYERS,
        "source": source,
        "boundary_version": None,
    }
    reply = ask.chat(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=1, **extra
    )
    assert reply.lora == answer.lora


def test_equal_prompts_share_the_cache_within_a_depth_and_never_across(ask: Ask) -> None:
    wish: dict[str, Any] = {
        "max_tokens": 2,
        "temperature": 0,
        "prompt": f"{WAYS.index(ask.way):03} {PROMPT}",
    }
    num_tokens = 1 + len(wish["prompt"])
    num_blocks = (num_tokens - 1) // BLOCK_SIZE
    for model in ("plain@2", "plain@3", "head@3", BASE):
        for num_cached in (0, num_blocks * BLOCK_SIZE):
            usage = ask.complete(model=model, **wish).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == num_cached, model
            assert (usage.prompt_tokens, usage.completion_tokens) == (num_tokens, 2)
            assert usage.total_tokens == num_tokens + 2
