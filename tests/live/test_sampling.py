"""Every field that steers sampling has its effect, through the official client in each of its ways."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.live.asking import Ask
from tests.live.conftest import OracleOf
from tests.live.process import BASE, text_of
from tests.parity.oracle import Oracle
from tests.parity.zoo import BOS, EOS, PAD, VOCAB_SIZE

MODEL, ADAPTER, DEPTH = "plain@2", "plain", 2
PROMPT = "Once upon a time"
IDS = (BOS, *PROMPT.encode())
LENGTH = 8
WISH: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": LENGTH}
GREEDY = WISH | {"temperature": 0}
SAMPLED = WISH | {"temperature": 1.5, "seed": 7}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
FORCE, FORBID = 100, -100

Edit = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Logits `[vocab_size]` and the tokens written so far -> other logits."""


def greedy(
    oracle: Oracle, edit: Edit = lambda logits, written: logits, length: int = LENGTH
) -> str:
    """What a greedy loop over PEFT's logits writes, edited before each choice."""
    written: list[int] = []
    for _ in range(length):
        logits = oracle.logits([*IDS, *written], DEPTH)[-1].clone()
        written.append(int(edit(logits, written).argmax()))
    return text_of(tuple(written))


@pytest.fixture(scope="module")
def plain_text(oracle_of: OracleOf) -> str:
    """The greedy answer with no field set."""
    return greedy(oracle_of(ADAPTER))


def test_greedy_is_what_peft_writes(ask: Ask, plain_text: str) -> None:
    answer = ask.complete(**GREEDY)
    assert answer.text == plain_text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.num_chunks > LENGTH) is ask.is_stream


@pytest.mark.parametrize("length", [1, 5])
def test_max_tokens_is_the_length(ask: Ask, plain_text: str, length: int) -> None:
    answer = ask.complete(**GREEDY | {"max_tokens": length})
    assert answer.text == plain_text[:length]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == length
    whole = ask.chat(**CHAT, max_tokens=9, temperature=0).text
    for field in ("max_tokens", "max_completion_tokens"):
        reply = ask.chat(**CHAT, temperature=0, **{field: length})
        assert reply.text == whole[:length]
        assert reply.choices[0].finish_reason == "length"


def test_a_seed_makes_a_sample_repeatable(ask: Ask, plain_text: str) -> None:
    text = ask.complete(**SAMPLED).text
    assert ask.complete(**SAMPLED).text == text
    assert ask.complete(**SAMPLED | {"seed": 8}).text != text
    assert ask.complete(**SAMPLED | {"temperature": 1e-3}).text == plain_text != text
    reply = {"seed": 7, "temperature": 1.5, "max_tokens": LENGTH}
    assert ask.chat(**CHAT, **reply).text == ask.chat(**CHAT, **reply).text
    assert ask.chat(**CHAT, **reply).text != ask.chat(**CHAT, **reply | {"seed": 8}).text


@pytest.mark.parametrize("seed", [-(2**63), -3, 0, 2**63 - 1])
def test_every_seed_that_is_accepted_seeds(ask: Ask, seed: int) -> None:
    text = ask.complete(**SAMPLED | {"seed": seed}).text
    assert ask.complete(**SAMPLED | {"seed": seed}).text == text
    assert ask.complete(**SAMPLED | {"seed": 1}).text != text


def test_the_least_and_most_of_a_field_are_served(ask: Ask, plain_text: str) -> None:
    hottest = ask.complete(**SAMPLED | {"temperature": 1e38})
    assert hottest.usage is not None
    assert hottest.usage.completion_tokens == LENGTH
    assert ask.complete(**SAMPLED | {"temperature": 1e-6}).text == plain_text
    assert ask.complete(**SAMPLED, top_p=1e-300).text == plain_text
    for penalty in (1e-6, 10):
        answer = ask.complete(**GREEDY, extra_body={"repetition_penalty": penalty})
        assert len(answer.text) == LENGTH


def test_temperature_is_1_where_none_is_given(ask: Ask) -> None:
    wish = WISH | {"seed": 3}
    assert ask.complete(**wish).text == ask.complete(**wish, temperature=1).text
    assert ask.complete(**wish).text != ask.complete(**wish, temperature=1.5).text


@pytest.mark.parametrize(
    "field", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}]
)
def test_the_narrowest_choice_is_greedy(ask: Ask, plain_text: str, field: dict[str, Any]) -> None:
    assert ask.complete(**SAMPLED).text != plain_text
    assert ask.complete(**SAMPLED, **field).text == plain_text


def test_the_widest_choice_changes_nothing(ask: Ask) -> None:
    text = ask.complete(**SAMPLED).text
    assert ask.complete(**SAMPLED, top_p=1).text == text
    for field in ({"top_k": -1}, {"top_k": 0}, {"top_k": VOCAB_SIZE}, {"min_p": 0}):
        assert ask.complete(**SAMPLED, extra_body=field).text == text


def test_top_k_keeps_to_the_most_likely(ask: Ask, plain_text: str) -> None:
    answer = ask.complete(**SAMPLED, logprobs=3, extra_body={"top_k": 3})
    assert answer.text != plain_text
    (told,) = answer.choices
    for token, top in zip(told.tokens, told.tops, strict=True):
        assert top is not None
        assert token in top
        assert len(top) == 3


def test_n_choices_differ_and_repeat_with_their_seed(ask: Ask) -> None:
    answer = ask.complete(**SAMPLED, n=3)
    assert len(set(answer.texts)) == 3
    assert answer.texts[0] == ask.complete(**SAMPLED).text
    assert ask.complete(**SAMPLED, n=3).texts == answer.texts
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3 * LENGTH
    assert answer.usage.prompt_tokens == len(IDS)
    replies = ask.chat(**CHAT, n=2, seed=1, temperature=1.5, max_tokens=8)
    assert len(set(replies.texts)) == 2


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_text_before_it(ask: Ask, plain_text: str, as_list: bool) -> None:
    stop = plain_text[5:8]
    wish = GREEDY | {"stop": ["\x00", stop] if as_list else stop}
    (told,) = ask.complete(**wish).choices
    assert told.text == plain_text[: plain_text.index(stop)]
    assert (told.finish_reason, told.stop_reason) == ("stop", stop)
    reply = ask.chat(**CHAT, temperature=0, max_tokens=12)
    stop = reply.text[4:6]
    (told,) = ask.chat(**CHAT, temperature=0, max_tokens=12, stop=stop).choices
    assert told.text == reply.text[: reply.text.index(stop)]
    assert (told.finish_reason, told.stop_reason) == ("stop", stop)


def test_a_stop_token_ends_the_text(ask: Ask, plain_text: str) -> None:
    token_id = ord(plain_text[5])
    (told,) = ask.complete(**GREEDY, extra_body={"stop_token_ids": [PAD, token_id]}).choices
    assert told.text == plain_text[: plain_text.index(chr(token_id))]
    assert (told.finish_reason, told.stop_reason) == ("stop", token_id)


def test_min_tokens_puts_off_the_end_and_ignore_eos_takes_it_away(ask: Ask) -> None:
    wish = GREEDY | {"logit_bias": {str(EOS): FORCE}}

    def ended(**extra: Any) -> tuple[int, str | None]:
        answer = ask.complete(**wish, extra_body=extra)
        assert answer.usage is not None
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    assert ended() == (1, "stop")
    assert ended(min_tokens=4) == (5, "stop")
    assert ended(ignore_eos=True) == (LENGTH, "length")
    assert ended(ignore_eos=True, skip_special_tokens=False) == (LENGTH, "length")


def test_min_tokens_puts_off_a_stop_string_too(ask: Ask, plain_text: str) -> None:
    wish = GREEDY | {"stop": plain_text[2]}
    assert ask.complete(**wish).text == plain_text[: plain_text.index(plain_text[2])]
    text = ask.complete(**wish, extra_body={"min_tokens": 6}).text
    assert len(text) >= 5
    assert plain_text.startswith(text)


def _repeats_less(amount: float) -> Edit:
    def edit(logits: torch.Tensor, written: list[int]) -> torch.Tensor:
        seen = sorted({*IDS, *written})
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / amount, values * amount)
        return logits

    return edit


def _pays_once(amount: float) -> Edit:
    def edit(logits: torch.Tensor, written: list[int]) -> torch.Tensor:
        logits[sorted(set(written))] -= amount
        return logits

    return edit


def _pays_each_time(amount: float) -> Edit:
    def edit(logits: torch.Tensor, written: list[int]) -> torch.Tensor:
        for token_id in written:
            logits[token_id] -= amount
        return logits

    return edit


PENALTIES: list[tuple[dict[str, Any], Edit]] = [
    ({"presence_penalty": 2}, _pays_once(2)),
    ({"presence_penalty": -2}, _pays_once(-2)),
    ({"frequency_penalty": 2}, _pays_each_time(2)),
    ({"frequency_penalty": -2}, _pays_each_time(-2)),
    ({"extra_body": {"repetition_penalty": 10}}, _repeats_less(10)),
    ({"extra_body": {"repetition_penalty": 0.5}}, _repeats_less(0.5)),
]
NO_PENALTY = _pays_once(0)
PENALIZED_LENGTH = 16
"""By then characters repeat."""


@pytest.fixture(scope="module")
def penalized(oracle_of: OracleOf) -> Callable[[Edit], str]:
    """What PEFT's logits come to under a penalty."""
    return cache(lambda edit: greedy(oracle_of(ADAPTER), edit, PENALIZED_LENGTH))


@pytest.mark.parametrize(
    ("field", "edit"),
    PENALTIES,
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_a_penalty_is_its_formula(
    ask: Ask, penalized: Callable[[Edit], str], field: dict[str, Any], edit: Edit
) -> None:
    assert penalized(edit) != penalized(NO_PENALTY)
    answer = ask.complete(**GREEDY | {"max_tokens": PENALIZED_LENGTH}, **field)
    assert answer.text == penalized(edit)


def test_large_penalties_forbid_repeats(ask: Ask) -> None:
    # Two characters that everything else is far below: without a penalty the first is repeated.
    favour = GREEDY | {"logit_bias": {str(ord("a")): 100, str(ord("b")): 97}}
    assert ask.complete(**favour).text == "a" * LENGTH
    alternating = ask.complete(**favour, frequency_penalty=2).text
    assert 2 <= alternating.count("b") <= 5
    text = ask.complete(**GREEDY, extra_body={"repetition_penalty": 10}).text
    assert len(set(text)) == LENGTH
    assert not set(text) & set(PROMPT)


def test_logit_bias_forces_and_forbids(ask: Ask, plain_text: str, oracle_of: OracleOf) -> None:
    first = ord(plain_text[0])

    def forbid(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
        logits[first] += FORBID
        return logits

    assert ask.complete(**GREEDY, logit_bias={"35": FORCE}).text == "#" * LENGTH
    text = ask.complete(**GREEDY, logit_bias={str(first): FORBID}).text
    assert text == greedy(oracle_of(ADAPTER), forbid)
    assert chr(first) not in text
    assert ask.chat(**CHAT, max_tokens=4, logit_bias={"35": FORCE}).text == "####"


def test_special_tokens_are_left_out_unless_asked_for(ask: Ask) -> None:
    wish = GREEDY | {"max_tokens": 2, "logit_bias": {str(PAD): FORCE}}
    assert ask.complete(**wish).text == ""
    assert ask.complete(**wish, extra_body={"skip_special_tokens": False}).text == "<pad><pad>"
    reply = {"max_tokens": 2, "logit_bias": {str(PAD): FORCE}}
    assert ask.chat(**CHAT, **reply).text == ""
    assert ask.chat(**CHAT, **reply, extra_body={"skip_special_tokens": False}).text == (
        "<pad><pad>"
    )


def test_special_tokens_are_added_to_a_prompt_unless_declined(
    ask: Ask, oracle_of: OracleOf
) -> None:
    for extra, prompt in (({}, IDS), ({"add_special_tokens": False}, IDS[1:])):
        answer = ask.complete(**GREEDY, extra_body=extra)
        expected = oracle_of(ADAPTER).greedy(prompt, LENGTH, DEPTH)
        assert answer.text == text_of(expected.token_ids)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
    lengths = []
    for extra in ({}, {"add_special_tokens": True}):
        usage = ask.chat(**CHAT, max_tokens=1, extra_body=extra).usage
        assert usage is not None
        lengths.append(usage.prompt_tokens)
    assert lengths[1] == lengths[0] + 1


def test_user_and_metadata_change_nothing(ask: Ask, plain_text: str) -> None:
    labels: dict[str, Any] = {"user": "someone", "extra_body": {"metadata": {"team": "a"}}}
    assert ask.complete(**GREEDY, **labels).text == plain_text
    reply = ask.chat(**CHAT, temperature=0, max_tokens=8)
    assert ask.chat(**CHAT, temperature=0, max_tokens=8, **labels).text == reply.text


def test_the_base_model_takes_the_same_fields(ask: Ask) -> None:
    wish = SAMPLED | {"model": BASE}
    assert ask.complete(**wish).text == ask.complete(**wish).text
    assert ask.complete(**wish).text != ask.complete(**SAMPLED).text
