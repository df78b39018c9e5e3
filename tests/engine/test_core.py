"""The step under fire: whatever is added, aborted or broken, each request ends once and alone."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.engine import core as core_module
from server.engine.block_manager import root_key
from server.engine.core import EngineCore
from server.engine.request import LoraSelection, Request
from server.engine.row_state import RowState
from server.engine.sampler import Launched
from server.errors import BadRequest, GenerationError
from server.model.adapters import AdapterSlots
from server.model.batch import BatchedSequence
from tests.parity.oracle import Oracle
from tests.parity.zoo import EOS, NUM_LAYERS, VOCAB_SIZE, random_prompt
from tests.tiny import (
    BASE,
    BASE_NAME,
    Outbox,
    Tiny,
    assert_everything_is_back,
    load_tiny,
    make_core,
    make_request,
    open_tiny,
    run,
    run_to_end,
)

PROMPT = random_prompt(21, seed=1)
POISON = 200
"""A token id that no prompt here has, unless it is meant to be poisoned."""

Run = Callable[[list[BatchedSequence]], tuple[torch.Tensor, list[int]]]


@pytest.fixture
def core(tiny: Tiny) -> Iterator[EngineCore]:
    with open_tiny(tiny, "a", "b") as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> Callable[..., tuple[tuple[int, ...], ...]]:
    """Token ids of every sequence of a request that had an engine of its own, without prefix cache."""
    own_tiny = load_tiny(tiny.model_path, tiny.adapter_root)

    @cache
    def tokens(
        adapter: str | None,
        depth: int,
        prompt: tuple[int, ...],
        max_tokens: int = 6,
        **sampling: Any,
    ) -> tuple[tuple[int, ...], ...]:
        adapters = () if adapter is None else (adapter,)
        with open_tiny(
            own_tiny, *adapters, prefix_caching=False, max_num_batched_tokens=512
        ) as own:
            lora = own.registry.select(adapter or BASE_NAME, depth)
            outbox = run(own, make_request("x", prompt, lora, max_tokens, **sampling))
            return tuple(outbox.token_ids("x", i) for i in range(sampling.get("n", 1)))

    return tokens


@pytest.mark.parametrize("adapter", ["a", "c"])
def test_a_request_alone_gets_what_peft_gives(
    tiny: Tiny, alone: Callable[..., Any], adapter: str
) -> None:
    """What all that is compared with `alone` here stands on."""
    oracle = Oracle(tiny.model_path, tiny.adapter(adapter))
    answers = [oracle.greedy(PROMPT, 6, depth).token_ids for depth in range(NUM_LAYERS + 1)]
    assert [alone(adapter, depth, PROMPT)[0] for depth in range(NUM_LAYERS + 1)] == answers
    assert alone(None, 0, PROMPT)[0] == answers[0]
    assert len(set(answers)) == len(answers)


def prompt_without(token_id: int, num_tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(0 if t == token_id else t for t in random_prompt(num_tokens, seed=seed))


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("num_blocks", [64, 14])
def test_an_abort_before_any_step_leaves_nothing_behind(
    tiny: Tiny, alone: Callable[..., Any], num_blocks: int
) -> None:
    """With 64 blocks all run side by side; with 14 some are preempted."""

    def requests(core: EngineCore) -> list[Request]:
        return [
            make_request(
                "gone", PROMPT, core.registry.select("a", 3), n=2, temperature=0.8, seed=5
            ),
            make_request("deep", random_prompt(18, seed=2), core.registry.select("b", 4)),
            make_request("base", random_prompt(9, seed=3)),
        ]

    expected = {
        "deep": alone("b", 4, random_prompt(18, seed=2))[0],
        "base": alone(None, 0, random_prompt(9, seed=3))[0],
    }
    num_preemptions = num_steps = 0
    is_done = False
    while not is_done:
        with open_tiny(tiny, "a", "b", num_blocks=num_blocks, max_loras=2) as core:
            outbox = Outbox()
            for request in requests(core):
                core.add(request)
            for _ in range(num_steps):
                outbox.take(core.step())
            is_done = outbox.is_finished("gone")
            last = core.abort("gone")
            assert (last is None) == is_done
            if last is not None:
                outbox.take([last])
                assert set(outbox.finish_reasons("gone").values()) <= {"abort", "length"}
                assert len(outbox.finish_reasons("gone")) == 2
            assert core.abort("gone") is None
            run_to_end(core, outbox)
            for name, token_ids in expected.items():
                assert outbox.token_ids(name) == token_ids
            num_preemptions += core.stats().num_preemptions
            assert_everything_is_back(core)
        num_steps += 1
    assert num_steps > 8
    assert (num_preemptions > 0) == (num_blocks == 14)


def test_closing_ends_every_request_once(core: EngineCore) -> None:
    core.add(make_request("x", PROMPT, core.registry.select("a", 2)))
    core.add(make_request("y", PROMPT[:3]))
    outbox = Outbox()
    outbox.take(core.step())
    outbox.take(core.close())
    assert outbox.last("x").deltas[0].finish_reason == "abort"
    assert outbox.last("y").deltas[0].finish_reason == "abort"
    assert_everything_is_back(core)


def test_text_that_was_held_back_comes_with_the_abort(core: EngineCore) -> None:
    only_a = ((ord("a"), 100.0),)
    core.add(make_request("x", PROMPT, stop=("ab",), logit_bias=only_a))
    outbox = Outbox()
    while not outbox.token_ids("x"):
        outbox.take(core.step())
    assert outbox.text("x") == ""  # held back: the stop string may follow
    last = core.abort("x")
    assert last is not None
    outbox.take([last])
    assert outbox.text("x") == "a"


def test_what_could_never_finish_is_refused_and_changes_nothing(core: EngineCore) -> None:
    limit = core.info.max_model_len
    for prompt, max_tokens, sampling, message in [
        ((), 1, {}, "empty"),
        ((5, VOCAB_SIZE), 1, {}, f"token id {VOCAB_SIZE}"),
        ((-1,), 1, {}, "token id -1"),
        ((1,) * 10, limit - 9, {}, f"limit of {limit}"),
        ((1,), 1, {"logit_bias": ((VOCAB_SIZE, 1.0),)}, "logit_bias"),
        ((1,), 1, {"grammar": "no grammar"}, "grammar"),
    ]:
        with pytest.raises(BadRequest, match=message):
            core.add(make_request("x", prompt, max_tokens=max_tokens, **sampling))
    assert not core.has_work
    assert core.abort("x") is None
    fits = run(core, make_request("x", (1,) * 10, max_tokens=limit - 10))
    assert len(fits.token_ids("x")) == limit - 10
    assert_everything_is_back(core)


# ---------------------------------------------------------------- several sequences, no sequence


def test_each_of_n_has_its_own_stream_and_shares_the_prompt(
    core: EngineCore, alone: Callable[..., Any]
) -> None:
    sampling = {"n": 3, "temperature": 1.0, "seed": 11}
    outbox = run(core, make_request("x", PROMPT, core.registry.select("a", 2), **sampling))
    got = tuple(outbox.token_ids("x", index) for index in range(3))
    assert got == alone("a", 2, PROMPT, **sampling)
    assert len(set(got)) == 3
    assert outbox.finish_reasons("x") == {0: "length", 1: "length", 2: "length"}
    assert outbox.last("x").num_output_tokens == 18
    # 21 tokens are 5 full blocks of 4: both siblings take them from the cache.
    assert core.stats().num_cached_tokens == 2 * 20
    assert core.stats().num_looked_up_tokens == 3 * len(PROMPT)
    assert outbox.last("x").num_cached_tokens == 0
    assert_everything_is_back(core)


@pytest.mark.parametrize("budget", [16, 512])
def test_scoring_a_prompt_draws_nothing(tiny: Tiny, budget: int) -> None:
    """`budget` 16 scores in two chunks, 512 in one."""
    with open_tiny(tiny, "a", max_num_batched_tokens=budget) as core:
        request = make_request("x", PROMPT, BASE, 0, prompt_logprobs=2)
        run(core, make_request("warm", PROMPT))  # a prefix that must not be taken
        outbox = run(core, request)
        (output,) = outbox.outputs["x"]
        assert outbox.token_ids("x") == ()
        assert outbox.finish_reasons("x") == {0: "length"}
        assert output.num_cached_tokens == 0
        assert core.stats().num_looked_up_tokens == len(PROMPT), "only the first looks"
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        scored = output.prompt_logprobs[1:]
        assert_everything_is_back(core)
    model = tiny.base.model
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation("fathom_paged")
    expected = logits.log_softmax(-1)
    assert [entry.token_id for entry in scored if entry] == list(PROMPT[1:])
    for position, entry in enumerate(scored):
        assert entry is not None
        assert entry.logprob == pytest.approx(
            float(expected[position, PROMPT[position + 1]]), abs=1e-4
        )
        assert entry.top[0][0] == int(expected[position].argmax())
        assert len(entry.top) == 2


def test_prompt_logprobs_come_once_and_tokens_after_them(
    core: EngineCore, alone: Callable[..., Any]
) -> None:
    outbox = run(core, make_request("x", PROMPT, n=2, prompt_logprobs=0, temperature=1.0, seed=3))
    reports = [o.prompt_logprobs for o in outbox.outputs["x"] if o.prompt_logprobs is not None]
    assert [len(report) for report in reports] == [len(PROMPT)]
    expected = alone(None, 0, PROMPT, n=2, temperature=1.0, seed=3)
    assert (outbox.token_ids("x", 0), outbox.token_ids("x", 1)) == expected


def test_scores_begin_anew_with_a_preempted_prompt(tiny: Tiny) -> None:
    prompt = random_prompt(36, seed=6)
    with open_tiny(tiny) as roomy:
        expected = run(roomy, make_request("x", prompt, prompt_logprobs=0)).outputs["x"][0]
    with open_tiny(tiny, num_blocks=12) as core:
        core.add(make_request("first", PROMPT[:11], max_tokens=20))
        outbox = Outbox()
        outbox.take(core.step())
        # Its nine blocks are free when it comes, and one fewer when it is at its third chunk.
        core.add(make_request("x", prompt, prompt_logprobs=0))
        run_to_end(core, outbox)
        assert core.stats().num_preemptions == 1
        actual = outbox.outputs["x"][0]
    assert expected.prompt_logprobs is not None
    assert actual.prompt_logprobs is not None
    assert len(actual.prompt_logprobs) == len(prompt)
    for one, other in zip(actual.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_prompt_of_one_token_has_nothing_to_score(core: EngineCore) -> None:
    outbox = run(core, make_request("x", (7,), BASE, 0, prompt_logprobs=1))
    assert outbox.last("x").prompt_logprobs == (None,)
    assert outbox.finish_reasons("x") == {0: "length"}


def test_no_tokens_and_no_scores_still_ends(core: EngineCore) -> None:
    outbox = run(core, make_request("x", PROMPT, core.registry.select("a", 4), 0, n=2))
    assert outbox.finish_reasons("x") == {0: "length", 1: "length"}
    assert_everything_is_back(core)


def test_layers_with_and_without_lora_are_counted(core: EngineCore) -> None:
    num_computed = len(PROMPT) + 5  # the sixth token is drawn and never computed
    run(core, make_request("base", PROMPT))
    assert (core.stats().layers.applied, core.stats().layers.skipped) == (0, 0)
    run(core, make_request("x", PROMPT, core.registry.select("a", 1)))
    assert core.stats().layers.applied == num_computed
    assert core.stats().layers.skipped == num_computed * (NUM_LAYERS - 1)


def test_steps_are_counted_with_what_they_held(core: EngineCore) -> None:
    outbox = run(core, make_request("x", PROMPT, n=2), make_request("y", PROMPT[:3]))
    counts, num_steps = core.tally.steps, core.stats().num_steps
    for distribution in (counts.seconds, counts.num_seqs, counts.num_tokens):
        assert sum(distribution.counts()) == num_steps
    assert counts.seconds.total > 0
    num_computed = len(PROMPT) + len(PROMPT[:3]) + 3 * 5  # the last token of each is not computed
    num_again = len(PROMPT) - core.stats().num_cached_tokens  # of the second of x's two
    assert counts.num_tokens.total == num_computed + num_again
    last = outbox.last("x")
    assert 1 == last.first_step < last.step <= num_steps
    assert last.scheduled_s > 0


def test_a_request_that_waits_has_its_first_step_later(core: EngineCore) -> None:
    core.scheduler.max_num_seqs = 1
    outbox = run(core, make_request("x", PROMPT), make_request("y", PROMPT))
    first, second = outbox.last("x"), outbox.last("y")
    assert second.first_step == first.step + 1
    assert second.scheduled_s > first.scheduled_s


def test_adapters_are_counted_as_they_come_and_go(tiny: Tiny) -> None:
    with open_tiny(tiny, max_loras=1, max_cpu_loras=1, adapter_root=tiny.adapter_root) as core:
        for number, name in enumerate("abba"):
            run(core, make_request(f"{number}", PROMPT, core.registry.select(name, 2)))
        device, host = core.device_count(), core.registry.host_count()
    assert (device.num_resident, device.num_loads, device.num_evictions) == (1, 3, 2)
    assert (host.num_resident, host.num_loads, host.num_evictions) == (1, 3, 2)
    assert core.registry.num_known == 2


def test_tokens_that_end_a_sequence(core: EngineCore) -> None:
    first, second, *_ = run(core, make_request("probe", PROMPT)).token_ids("probe")
    assert first != second
    by_id = run(core, make_request("x", PROMPT, stop_token_ids=(second,)))
    assert by_id.token_ids("x") == (first, second)
    assert by_id.last("x").deltas[0].stop_reason == second
    by_eos = run(core, make_request("x", PROMPT, ignore_eos=False, logit_bias=((EOS, 100.0),)))
    assert by_eos.token_ids("x") == (EOS,)
    assert by_eos.last("x").deltas[0].stop_reason is None
    assert by_eos.finish_reasons("x") == {0: "stop"}
    ignored = run(core, make_request("x", PROMPT, ignore_eos=True, logit_bias=((EOS, 100.0),)))
    assert ignored.token_ids("x") == (EOS,) * 6


# ---------------------------------------------------------------- isolation


def raise_on_poison(run_step: Run) -> Run:
    def poisoned(batch: list[BatchedSequence]) -> tuple[torch.Tensor, list[int]]:
        if any(POISON in sequence.token_ids for sequence in batch):
            raise RuntimeError("poison")
        return run_step(batch)

    return poisoned


def nan_on_poison(run_step: Run) -> Run:
    def poisoned(batch: list[BatchedSequence]) -> tuple[torch.Tensor, list[int]]:
        logits, order = run_step(batch)
        row = 0
        for sequence in (batch[index] for index in order):
            if POISON in sequence.token_ids:
                logits[row : row + sequence.num_logits] = torch.nan
            row += sequence.num_logits
        return logits, order

    return poisoned


@pytest.mark.parametrize("poison", [raise_on_poison, nan_on_poison])
@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_a_request_that_breaks_its_step_fails_alone(
    core: EngineCore,
    alone: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    poison: Callable[[Run], Run],
    prompt_logprobs: int | None,
) -> None:
    monkeypatch.setattr(core.runner, "run", poison(core.runner.run))
    bad = (*prompt_without(POISON, 5, seed=9), POISON)
    prompts = {name: prompt_without(POISON, 9 + len(name), seed=4) for name in ("one", "three")}
    outbox = run(
        core,
        make_request("one", prompts["one"], core.registry.select("a", 2)),
        make_request(
            "bad", bad, core.registry.select("b", 3), n=2, prompt_logprobs=prompt_logprobs
        ),
        make_request("three", prompts["three"]),
    )
    last = outbox.last("bad")
    assert isinstance(last.error, GenerationError)
    assert outbox.finish_reasons("bad") == {0: "error", 1: "error"}
    assert outbox.token_ids("one") == alone("a", 2, prompts["one"])[0]
    assert outbox.token_ids("three") == alone(None, 0, prompts["three"])[0]
    assert_everything_is_back(core)


def test_a_row_that_cannot_be_sampled_fails_alone(
    core: EngineCore, alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = core.stepper.sampler.launch

    def out_of_memory(logits: torch.Tensor, rows: list[RowState], masks: Any) -> Launched:
        if any(row.sampling.top_p == 0.5 for row in rows):
            raise torch.OutOfMemoryError("no memory")
        return launch(logits, rows, masks)

    monkeypatch.setattr(core.stepper.sampler, "launch", out_of_memory)
    seeded = {"temperature": 1.0, "seed": 4}
    outbox = run(
        core,
        make_request("bad", PROMPT[:5], n=2, top_p=0.5, temperature=1.0),
        make_request("good", PROMPT, core.registry.select("a", 2), **seeded),
    )
    assert isinstance(outbox.last("bad").error, GenerationError)
    assert outbox.finish_reasons("bad") == {0: "error", 1: "error"}
    assert outbox.token_ids("good") == alone("a", 2, PROMPT, **seeded)[0]
    assert_everything_is_back(core)


class FailingMatcher:
    """A grammar that allows everything, until it fails after `num_tokens`."""

    is_finished = False

    def __init__(self, num_tokens: int, where: str) -> None:
        self._left = num_tokens
        self._where = where

    def mask(self) -> Any:
        if self._left == 0 and self._where == "mask":
            raise GenerationError("the grammar failed")
        return np.full((VOCAB_SIZE + 31) // 32, -1, np.int32)

    def advance(self, token_id: int) -> None:
        if self._left == 0 and self._where == "advance":
            raise GenerationError("the grammar failed")
        self._left -= 1


@pytest.mark.parametrize("where", ["mask", "advance"])
def test_a_grammar_that_fails_midway_fails_alone(
    tiny: Tiny, alone: Callable[..., Any], where: str
) -> None:
    # Without the cache no sequence waits for its leader: both fail in the same step, once.
    with open_tiny(tiny, "a", prefix_caching=False, max_num_batched_tokens=64) as core:
        core.grammars.matcher = lambda grammar: FailingMatcher(2, where)  # type: ignore[method-assign]
        outbox = run(
            core,
            make_request("bad", PROMPT[:5], grammar="any", n=2, temperature=1.0, seed=1),
            make_request("good", PROMPT, core.registry.select("a", 2)),
        )
        assert isinstance(outbox.last("bad").error, GenerationError)
        assert outbox.finish_reasons("bad") == {0: "error", 1: "error"}
        assert len(outbox.token_ids("bad", 0)) == 2
        assert outbox.token_ids("good") == alone("a", 2, PROMPT)[0]
        assert_everything_is_back(core)


def test_a_grammar_that_is_complete_ends_its_sequence(core: EngineCore) -> None:
    outbox = run(core, make_request("x", PROMPT, grammar='start: "ab"', max_tokens=9))
    assert outbox.text("x") == "ab"
    assert outbox.finish_reasons("x") == {0: "stop"}


@pytest.mark.parametrize("method", ["append", "finish"])
def test_a_tokenizer_that_fails_on_one_sequence_fails_it_alone(
    core: EngineCore, alone: Callable[..., Any], method: str
) -> None:
    core.add(make_request("bad", PROMPT[:5]))
    core.add(make_request("good", PROMPT))

    def broken(*_: Any) -> Any:
        raise IndexError("no such token")

    setattr(core._groups["bad"].sequences[0].detokenizer, method, broken)
    outbox = run_to_end(core, Outbox())
    assert isinstance(outbox.last("bad").error, GenerationError)
    assert outbox.token_ids("good") == alone(None, 0, PROMPT)[0]
    assert_everything_is_back(core)


def test_an_adapter_that_does_not_fit_the_device_fails_its_requests_alone(
    core: EngineCore, alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = AdapterSlots.acquire
    bad = core.registry.select("b", 2)

    def out_of_memory(self: AdapterSlots, uid: int, *rest: Any) -> int | None:
        if bad.adapter is not None and uid == bad.adapter.uid:
            raise torch.OutOfMemoryError("no memory")
        return acquire(self, uid, *rest)

    monkeypatch.setattr(AdapterSlots, "acquire", out_of_memory)
    outbox = run(
        core,
        make_request("bad", PROMPT, bad, n=2),
        make_request("good", PROMPT, core.registry.select("a", 2)),
    )
    assert isinstance(outbox.last("bad").error, GenerationError)
    assert outbox.finish_reasons("bad") == {0: "error", 1: "error"}
    assert outbox.token_ids("good") == alone("a", 2, PROMPT)[0]
    assert_everything_is_back(core)


@pytest.mark.parametrize("is_idle", [True, False])
def test_an_adapter_that_finds_no_memory_is_tried_once_more_with_what_is_free(
    core: EngineCore, alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, is_idle: bool
) -> None:
    """Room for one adapter: another comes when its users have ended, and fails alone before."""
    put = AdapterSlots._weights

    def one_only(self: AdapterSlots, module: Any) -> Any:
        if self.num_resident:
            raise torch.OutOfMemoryError("no memory")
        return put(self, module)

    monkeypatch.setattr(AdapterSlots, "_weights", one_only)
    first = make_request("first", PROMPT, core.registry.select("a", 2))
    second = make_request("second", PROMPT, core.registry.select("b", 2))
    if is_idle:
        run(core, first)
        assert run(core, second).token_ids("second") == alone("b", 2, PROMPT)[0]
    else:
        outbox = run(core, first, second)
        assert isinstance(outbox.last("second").error, GenerationError)
        assert outbox.token_ids("first") == alone("a", 2, PROMPT)[0]
    assert_everything_is_back(core)


def overflow(core: EngineCore, tiny: Tiny) -> LoraSelection:
    """An adapter of finite weights whose keys and values are not."""
    ref = core.registry.load("overflow", tiny.adapter("a"))
    for module in ref.content.modules.values():  # type: ignore[attr-defined]
        module.lora_B.fill_(3e37)
    return core.registry.select("overflow", "full")


@pytest.mark.parametrize("is_aborted", [True, False])
@pytest.mark.parametrize("num_short", [1, 3])
def test_keys_that_are_not_finite_reach_no_other_sequence(
    tiny: Tiny, alone: Callable[..., Any], num_short: int, is_aborted: bool
) -> None:
    """Neither beside it in a step nor in the blocks that it leaves behind."""
    with open_tiny(tiny, prefix_caching=False, max_num_batched_tokens=18) as core:
        bad = overflow(core, tiny)
        short, long = PROMPT[:num_short], PROMPT[:18]
        core.add(make_request("bad", PROMPT, bad))
        outbox = Outbox()
        outbox.take(core.step())  # 18 of 21 tokens: no logits yet
        assert not outbox.outputs
        assert not all(bool(keys.isfinite().all()) for keys in core.runner.cache.keys)
        core.add(make_request("short", short))
        core.add(make_request("long", long))
        if is_aborted:
            outbox.take([output for output in [core.abort("bad")] if output])
        run_to_end(core, outbox)
        assert (outbox.last("bad").error is None) == is_aborted
        assert outbox.token_ids("short") == alone(None, 0, short)[0]
        assert outbox.token_ids("long") == alone(None, 0, long)[0]
        assert_everything_is_back(core)


# ---------------------------------------------------------------- adapters that come and go


def test_a_reload_leaves_running_requests_their_weights(
    tiny: Tiny, alone: Callable[..., Any]
) -> None:
    with open_tiny(tiny, "a") as core:
        old = core.registry.select("a", 3)
        core.add(make_request("old", PROMPT, old))
        core.add(make_request("old_waits", PROMPT, old))
        outbox = Outbox()
        outbox.take(core.step())
        core.registry.load("a", tiny.adapter("b"), replace=True)
        new = core.registry.select("a", 3)
        core.add(make_request("new", PROMPT, new))
        run_to_end(core, outbox)
        assert outbox.token_ids("old") == alone("a", 3, PROMPT)[0]
        assert outbox.token_ids("old_waits") == alone("a", 3, PROMPT)[0]
        assert outbox.token_ids("new") == alone("b", 3, PROMPT)[0]
        assert alone("a", 3, PROMPT) != alone("b", 3, PROMPT)
        assert outbox.last("new").num_cached_tokens == 0
        assert_everything_is_back(core)


def test_what_host_memory_dropped_is_read_again(tiny: Tiny, alone: Callable[..., Any]) -> None:
    with open_tiny(tiny, "a", max_cpu_loras=1) as core:
        first = core.registry.select("a", 2)
        core.add(make_request("first", PROMPT, first))
        core.registry.load("b", tiny.adapter("b"))
        assert [ref.name for ref in core.registry.loaded()] == ["b"]
        again = core.registry.select("a", 2)
        assert first.adapter is not None
        assert again.adapter is not None
        assert again.adapter.uid != first.adapter.uid
        assert again.adapter.digest == first.adapter.digest
        outbox = run(core, make_request("again", PROMPT, again))
        # Of equal content are equal keys and values, whichever reading they came from.
        assert outbox.token_ids("again") == alone("a", 2, PROMPT)[0]
        assert outbox.token_ids("first") == alone("a", 2, PROMPT)[0]
        warm = run(core, make_request("warm", PROMPT, again))
        assert warm.last("warm").num_cached_tokens == 20
        assert_everything_is_back(core)


def test_an_unloaded_adapter_serves_those_who_began_with_it(
    core: EngineCore, alone: Callable[..., Any]
) -> None:
    core.add(make_request("x", PROMPT, core.registry.select("a", 2)))
    core.registry.unload("a")
    assert run_to_end(core, Outbox()).token_ids("x") == alone("a", 2, PROMPT)[0]


def test_more_adapters_than_slots_take_turns(tiny: Tiny, alone: Callable[..., Any]) -> None:
    wanted = [("a", 3), ("b", 2), ("c", 4), (None, 0), ("a", 1), ("b", 4), ("shallow", 4)]
    with open_tiny(tiny, "a", "b", "c", "shallow", max_loras=2) as core:
        for index, (name, depth) in enumerate(wanted):
            lora = core.registry.select(name or BASE_NAME, depth)
            core.add(make_request(str(index), PROMPT[: 9 + index], lora))
        outbox, most = Outbox(), 0
        while core.has_work:
            outbox.take(core.step())
            most = max(most, len(core.runner.slots.resident_uids))
        assert most == 2
        for index, (name, depth) in enumerate(wanted):
            expected = alone(name, depth, PROMPT[: 9 + index])[0]
            assert outbox.token_ids(str(index)) == expected, (name, depth)
        assert_everything_is_back(core)


# ---------------------------------------------------------------- identity


def test_what_differs_shares_no_block_and_what_is_equal_does(tiny: Tiny) -> None:
    with open_tiny(tiny, "a", "b", "shallow") as core:

        def num_cached(name: str, depth: int | str) -> int:
            request = make_request("x", PROMPT, core.registry.select(name, depth))
            return run(core, request).last("x").num_cached_tokens

        assert num_cached("a", 2) == 0
        assert num_cached("a", 3) == 0  # another depth
        assert num_cached("b", 2) == 0  # another adapter
        assert num_cached(BASE_NAME, 0) == 0
        assert num_cached("a", 0) == 20  # no adapter at all: the base's blocks
        assert num_cached("a", 2) == 20
        assert num_cached("shallow", 3) == 0
        assert num_cached("shallow", "full") == 20  # it reaches layers 0 and 2 only
        core.registry.load("twin", tiny.adapter("a"))
        assert num_cached("twin", 3) == 20  # the same content under another name
        assert core.blocks.num_free == core.blocks.num_blocks


def depths_on_a_warm_cache(tiny: Tiny) -> dict[int, tuple[int, ...]]:
    """The same prompt at every depth in turn, as recalibrating its adapter would have it."""
    with open_tiny(tiny, "a") as core:
        return {
            depth: run(core, make_request("x", PROMPT, core.registry.select("a", depth))).token_ids(
                "x"
            )
            for depth in range(NUM_LAYERS + 1)
        }


def test_a_change_of_depth_reuses_nothing_stale(tiny: Tiny, alone: Callable[..., Any]) -> None:
    expected = {depth: alone("a", depth, PROMPT)[0] for depth in range(NUM_LAYERS + 1)}
    assert depths_on_a_warm_cache(tiny) == expected


@pytest.mark.parametrize("forgotten", ["depth", "everything"])
def test_without_the_depth_in_the_key_the_tokens_are_wrong(
    tiny: Tiny, alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    def key(base_revision: str, lora: LoraSelection) -> bytes:
        if forgotten == "everything":
            return b"constant"
        whole = LoraSelection(lora.adapter, lora.num_layers, lora.num_layers, "full")
        return root_key(base_revision, whole)

    monkeypatch.setattr(core_module, "root_key", key)
    expected = {depth: alone("a", depth, PROMPT)[0] for depth in range(NUM_LAYERS + 1)}
    assert depths_on_a_warm_cache(tiny) != expected


def test_the_root_key_names_base_content_and_depth(core: EngineCore) -> None:
    selections = [core.registry.select(name, depth) for name in "ab" for depth in (1, 2, 4)]
    keys = {root_key(revision, lora) for revision in ("r1", "r2") for lora in [*selections, BASE]}
    assert len(keys) == 2 * (len(selections) + 1)
    assert root_key("r1", core.registry.select("a", 0)) == root_key("r1", BASE)


def test_cached_tokens_are_counted_when_first_admitted(tiny: Tiny) -> None:
    """A preempted request finds its own blocks again, which its usage does not call cached."""
    with open_tiny(tiny, num_blocks=10) as core:
        core.add(make_request("first", PROMPT[:14], max_tokens=20))
        outbox = Outbox()
        outbox.take(core.step())
        # Its 23 tokens fit in 6 blocks when it comes; the first then takes one of those.
        core.add(make_request("second", random_prompt(23, seed=8), max_tokens=3))
        run_to_end(core, outbox)
        assert core.stats().num_preemptions > 0
        assert outbox.last("first").num_cached_tokens == 0
        assert outbox.last("second").num_cached_tokens == 0
        assert core.stats().num_cached_tokens == 0


# ---------------------------------------------------------------- anything in any order


class Traffic(RuleBasedStateMachine):
    """Random requests on an engine with too few blocks and slots."""

    tiny: Tiny
    alone: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.core = make_core(
            self.tiny, num_blocks=16, max_num_batched_tokens=16, max_num_seqs=4, max_loras=1
        )
        for name in ("a", "b"):
            self.core.registry.load(name, self.tiny.adapter(name))
        self.outbox = Outbox()
        self.added: dict[str, tuple[str | None, int, tuple[int, ...], int]] = {}
        self.aborted: set[str] = set()

    @rule(
        adapter=st.sampled_from([None, "a", "b"]),
        depth=st.sampled_from([0, 1, 3]),
        num_tokens=st.sampled_from([1, 8, 13, 25]),
        seed=st.sampled_from([1, 2]),
        max_tokens=st.sampled_from([1, 7]),
        n=st.sampled_from([1, 2]),
    )
    def add(
        self,
        adapter: str | None,
        depth: int,
        num_tokens: int,
        seed: int,
        max_tokens: int,
        n: int,
    ) -> None:
        depth = 0 if adapter is None else depth
        lora = self.core.registry.select(adapter or BASE_NAME, depth)
        prompt = random_prompt(25, seed=seed)[:num_tokens]
        name = f"r{len(self.added)}"
        self.added[name] = (adapter, depth, prompt, max_tokens)
        self.core.add(make_request(name, prompt, lora, max_tokens, n=n))

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.added)))
        was_finished = self.outbox.is_finished(name)
        last = self.core.abort(name)
        assert (last is None) == was_finished
        if last is not None:
            assert last.finished
            self.outbox.take([last])
            self.aborted.add(name)

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.outbox.take(self.core.step())

    @invariant()
    def blocks_are_held_by_running_sequences(self) -> None:
        core = self.core
        held = {block for s in core.scheduler.running for block in s.block_table}
        assert core.blocks.num_free == core.blocks.num_blocks - len(held)
        assert not any(s.block_table for s in core.scheduler.waiting)

    def teardown(self) -> None:
        run_to_end(self.core, self.outbox)
        for name, (adapter, depth, prompt, max_tokens) in self.added.items():
            assert self.outbox.is_finished(name)
            expected = self.alone(adapter, depth, prompt, 7)[0][:max_tokens]
            reasons = self.outbox.finish_reasons(name)
            for index, reason in reasons.items():
                got = self.outbox.token_ids(name, index)
                if reason == "length":
                    assert got == expected
                else:
                    assert name in self.aborted
                    assert got == expected[: len(got)]
        assert_everything_is_back(self.core)


def test_anything_in_any_order_ends_once_with_the_tokens_it_has_alone(
    tiny: Tiny, alone: Callable[..., Any]
) -> None:
    machine = type("Traffic", (Traffic,), {"tiny": tiny, "alone": staticmethod(alone)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
