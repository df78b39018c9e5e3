"""Log-probabilities over HTTP: the values are PEFT's at the chosen depth, in every shape they come in."""

import math
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from tests.live.asking import Ask
from tests.live.conftest import OracleOf
from tests.live.process import BASE
from tests.parity.zoo import BOS, NUM_LAYERS

PROMPT = "It was the best of times, it was the worst of times"
IDS = (BOS, *PROMPT.encode())
TOLERANCE = 1e-4
NUM_TOP = 4
LENGTH = 8

MODELS: list[tuple[str, str | None, int]] = [
    (BASE, None, 0),
    ("plain@0", "plain", 0),
    ("plain@1", "plain", 1),
    ("dora@2", "dora", 2),
    ("head@3", "head", 3),
    ("head@full", "head", NUM_LAYERS),
]
"""Name on the wire, adapter, depth."""


def scores(
    oracle_of: OracleOf, adapter: str | None, depth: int, token_ids: tuple[int, ...]
) -> torch.Tensor:
    """`[num_tokens, vocab_size]`: row `i` is the distribution of what follows token `i`."""
    return oracle_of(adapter).logits(token_ids, depth).log_softmax(-1)


def test_each_token_comes_with_its_own_score_and_the_best(ask: Ask, oracle_of: OracleOf) -> None:
    wish: dict[str, Any] = {"model": "head@full", "temperature": 1.5, "seed": 5}
    answer = ask.complete(**wish, prompt=PROMPT, max_tokens=LENGTH, logprobs=NUM_TOP)
    (told,) = answer.choices
    assert "".join(told.tokens) == told.text
    assert told.offsets == list(range(LENGTH))
    written = told.text.encode()
    expected = scores(oracle_of, "head", NUM_LAYERS, (*IDS, *written))[len(IDS) - 1 :]
    has_unlikely = False
    for token_id, logprob, top, row in zip(
        written, told.logprobs, told.tops, expected, strict=False
    ):
        assert top is not None
        assert top[chr(token_id)] == logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        best = row.topk(NUM_TOP).indices.tolist()
        assert set(top) == {chr(token_id), *map(chr, best)}
        for token, value in top.items():
            assert value == pytest.approx(float(row[ord(token)]), abs=TOLERANCE)
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
        has_unlikely |= token_id not in best
    assert has_unlikely, "no token shows that the chosen one is reported beyond the best"


def test_a_greedy_token_is_the_best_one(ask: Ask) -> None:
    wish: dict[str, Any] = {"model": "plain", "temperature": 0, "max_tokens": LENGTH}
    (told,) = ask.complete(**wish, prompt=PROMPT, logprobs=2).choices
    for token, top in zip(told.tokens, told.tops, strict=True):
        assert top is not None
        assert token == max(top, key=top.__getitem__)
    (alone,) = ask.complete(**wish, prompt=PROMPT, logprobs=0).choices
    # Not to the last bit: steps of one row may be replayed by now, which rounds otherwise than the model.
    assert alone.logprobs == pytest.approx(told.logprobs, abs=TOLERANCE)
    assert alone.tops == [
        {token: value} for token, value in zip(told.tokens, alone.logprobs, strict=True)
    ]


def test_scores_are_those_before_temperature_and_penalties(ask: Ask) -> None:
    wish: dict[str, Any] = {"model": "plain", "prompt": PROMPT, "max_tokens": 1, "logprobs": 1}
    forced = {"logit_bias": {"35": 100}}
    (cold,) = ask.complete(**wish, temperature=0, **forced).choices
    (hot,) = ask.complete(**wish, temperature=2, presence_penalty=2, **forced).choices
    assert cold.tokens == hot.tokens == ["#"]
    assert cold.logprobs == hot.logprobs
    assert cold.logprobs[0] is not None
    assert cold.logprobs[0] < -1


def test_chat_reports_the_same_in_its_own_shape(ask: Ask) -> None:
    wish: dict[str, Any] = {"model": "dora@2", "temperature": 0, "max_tokens": LENGTH}
    messages = [{"role": "user", "content": "hi"}]
    (told,) = ask.chat(**wish, messages=messages, logprobs=True, top_logprobs=3).choices
    prompt = "user: hi\nassistant: "
    (text,) = ask.complete(
        **wish, prompt=prompt, logprobs=3, extra_body={"add_special_tokens": False}
    ).choices
    assert told.text == text.text
    assert told.tokens == text.tokens
    assert told.logprobs == pytest.approx(text.logprobs, abs=1e-5)
    for ours, theirs in zip(told.tops, text.tops, strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.keys() == theirs.keys()
    (bare,) = ask.chat(**wish, messages=messages, logprobs=True).choices
    assert bare.logprobs == pytest.approx(told.logprobs, abs=1e-5)
    assert bare.tops == [{}] * LENGTH
    (none,) = ask.chat(**wish, messages=messages, logprobs=False).choices
    assert none.tokens == []


@pytest.mark.parametrize(("model", "adapter", "depth"), MODELS)
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echo_scores_the_prompt_at_the_depth(
    ask: Ask, oracle_of: OracleOf, model: str, adapter: str | None, depth: int, max_tokens: int
) -> None:
    answer = ask.complete(
        model=model, prompt=PROMPT, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1
    )
    (told,) = answer.choices
    assert told.tokens[: len(IDS)] == ["<bos>", *PROMPT]
    assert told.text == PROMPT + "".join(told.tokens[len(IDS) :])
    token_ids = (*IDS, *told.text[len(PROMPT) :].encode())
    assert len(token_ids) == len(told.tokens) == len(IDS) + max_tokens
    rows = scores(oracle_of, adapter, depth, token_ids)
    assert told.logprobs[0] is None
    assert told.tops[0] is None
    expected = rows[range(len(rows) - 1), token_ids[1:]].tolist()
    assert told.logprobs[1:] == pytest.approx(expected, abs=TOLERANCE)
    for top, row in zip(told.tops[1:], rows, strict=False):
        assert top is not None
        assert max(top.values()) == pytest.approx(float(row.max()), abs=TOLERANCE)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens


@pytest.mark.parametrize(("model", "adapter", "depth"), MODELS)
def test_prompt_logprobs_are_the_model_s_at_the_depth(
    client: OpenAI, oracle_of: OracleOf, model: str, adapter: str | None, depth: int
) -> None:
    answer = client.completions.create(
        model=model, prompt=list(IDS), max_tokens=0, extra_body={"prompt_logprobs": NUM_TOP}
    )
    first, *table = answer.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert first is None
    rows = scores(oracle_of, adapter, depth, IDS)
    for token_id, entries, row in zip(IDS[1:], table, rows, strict=False):
        order = row.argsort(descending=True).tolist()
        assert {int(key) for key in entries} == {token_id, *order[:NUM_TOP]}
        for key, entry in entries.items():
            assert entry["logprob"] == pytest.approx(float(row[int(key)]), abs=TOLERANCE)
            assert abs(float(row[order[entry["rank"] - 1]]) - entry["logprob"]) < TOLERANCE


def test_a_conversation_is_scored_as_its_prompt_is(http: httpx.Client) -> None:
    chat = {"model": "plain@2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}
    text = {"model": "plain@2", "prompt": "user: hi\nassistant: ", "max_tokens": 0}
    reply = http.post("/v1/chat/completions", json=chat | {"prompt_logprobs": 1}).json()
    answer = http.post(
        "/v1/completions", json=text | {"prompt_logprobs": 1, "add_special_tokens": False}
    ).json()
    ours, theirs = reply["prompt_logprobs"], answer["choices"][0]["prompt_logprobs"]
    assert len(ours) == reply["usage"]["prompt_tokens"]
    assert [entry and entry.keys() for entry in ours] == [
        entry and entry.keys() for entry in theirs
    ]
