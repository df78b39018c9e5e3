"""Steps launched before the last one's tokens are read: nobody can tell from what is said.

Engines here record their steps on a tape (`tests/model/tape.py`), as only those run ahead.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch

from server.engine import lookahead
from server.engine.core import EngineCore
from server.engine.request import Request
from server.engine.sequence import Status
from server.engine.stepper import Stepper
from server.model.decode import Fed
from tests.model.tape import TapeRecorder
from tests.parity.zoo import NUM_LAYERS, random_prompt
from tests.tiny import (
    Outbox,
    Tiny,
    assert_everything_is_back,
    load_tiny,
    make_request,
    open_tiny,
    run,
    run_to_end,
)


@pytest.fixture
def opened(tiny: Tiny) -> Iterator[EngineCore]:
    """An engine that runs ahead."""
    with open_tiny(tiny, "a", "b", "c", recorder=TapeRecorder(), num_blocks=96) as core:
        yield core


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> Callable[[Request], tuple[Any, ...]]:
    """What a request gets from an engine that does not run ahead and has no other; on its own model."""
    other = load_tiny(tiny.model_path, tiny.adapter_root)

    def generate(request: Request) -> tuple[Any, ...]:
        with open_tiny(other, "a", "b", "c") as core:
            name = request.lora.adapter.name if request.lora.adapter is not None else None
            lora = request.lora
            if name is not None:
                lora = core.registry.select(name, request.lora.depth)
            own = Request(request.id, request.prompt_token_ids, request.sampling, lora)
            return said(run(core, own), own)

    return generate


def said(outbox: Outbox, request: Request) -> tuple[Any, ...]:
    """All that a client can see."""
    indices = range(request.sampling.n)
    logprobs = [
        [scored.token_id for scored in delta.logprobs]
        for output in outbox.outputs[request.id]
        for delta in output.deltas
    ]
    return (
        [outbox.token_ids(request.id, index) for index in indices],
        [outbox.text(request.id, index) for index in indices],
        outbox.finish_reasons(request.id),
        list(chain.from_iterable(logprobs)) if request.sampling.n == 1 else None,
        outbox.last(request.id).num_output_tokens,
    )


def num_ahead(core: EngineCore) -> list[int]:
    """From now on, the rows of each step that is run ahead."""
    sizes: list[int] = []
    run_ahead = core.runner.run_ahead

    def counted(batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch))
        return run_ahead(batch, *rest)

    core.runner.run_ahead = counted  # type: ignore[method-assign]
    return sizes


def requests_of(core: EngineCore) -> list[Request]:
    """Every way to draw that needs no host, and to end."""
    made = []
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 0.9, "seed": 2, "top_p": 0.8, "top_k": 20, "n": 2},
        {"logprobs": 2},
        {"temperature": 1.2, "seed": 3, "min_p": 0.02, "logprobs": 0},
        {"logit_bias": ((65, 3.0), (66, -2.0))},
        {"ignore_eos": False, "stop_token_ids": tuple(range(0, 256, 9))},
        {"stop": tuple(chr(code) for code in range(97, 110))},
    ]
    for index, sampling in enumerate(kinds):
        name, depth = (("a", NUM_LAYERS), ("b", 2), ("c", 3), ("a", 1), (None, None))[index % 5]
        lora = core.registry.select("tiny" if name is None else name, depth)
        prompt = random_prompt(4 + index, seed=index)
        made.append(make_request(f"{index}", prompt, lora, 6 + 2 * index, **sampling))
    return made


def test_everyone_gets_what_they_get_alone(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]]
) -> None:
    requests = requests_of(opened)
    sizes = num_ahead(opened)
    outbox = run(opened, *requests)
    for request in requests:
        assert said(outbox, request) == alone(request), request.id
    assert len(sizes) > opened.stats().num_steps / 2
    reasons = {outbox.finish_reasons(request.id)[0] for request in requests}
    assert reasons == {"length", "stop"}
    assert_everything_is_back(opened)


def test_the_next_step_is_launched_before_this_ones_tokens_are_read(
    opened: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("launch", "read"):
        method = getattr(opened.stepper.sampler, name)

        def noted(*args: Any, name: str = name, method: Any = method) -> Any:
            order.append(name)
            return method(*args)

        monkeypatch.setattr(opened.stepper.sampler, name, noted)
    run(opened, make_request("one", random_prompt(5, seed=1), max_tokens=5))
    assert order == ["launch", "launch", "read", "launch", "read", "launch", "read", "launch",
                     "read", "read"]  # fmt: skip
    # Its length ends it: no step is run for a token that nobody will take.


def test_a_token_too_many_is_dropped(opened: EngineCore) -> None:
    """The last of three tokens is only known to be it when the fourth is on its way."""
    prompt = random_prompt(9, seed=4)
    free = run(opened, make_request("free", prompt, max_tokens=8)).token_ids("free")
    third = free[2]
    assert third not in free[:2]
    sizes = num_ahead(opened)
    outbox = run(opened, make_request("stopped", prompt, max_tokens=8, stop_token_ids=(third,)))
    assert outbox.token_ids("stopped") == free[:3]
    assert outbox.finish_reasons("stopped") == {0: "stop"}
    assert outbox.last("stopped").num_output_tokens == 3
    assert len(sizes) == 3
    again = run(opened, make_request("again", prompt, max_tokens=8))
    assert again.token_ids("again") == free
    assert_everything_is_back(opened)


def test_who_joins_waits_for_one_step_at_most(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]]
) -> None:
    outbox = Outbox()
    first = make_request("first", random_prompt(5, seed=1), opened.registry.select("a", 3), 20)
    later = make_request("later", random_prompt(6, seed=2), opened.registry.select("b", 4), 6)
    opened.add(first)
    for _ in range(4):
        outbox.take(opened.step())
    assert opened.stepper._ahead is not None
    opened.add(later)
    for _ in range(2):
        outbox.take(opened.step())
    assert len(outbox.token_ids("later")) == 1
    run_to_end(opened, outbox)
    for request in (first, later):
        assert said(outbox, request) == alone(request)


@pytest.mark.parametrize("num_steps", [2, 3, 5])
def test_an_abort_while_a_step_runs_ends_once_and_alone(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]], num_steps: int
) -> None:
    outbox = Outbox()
    requests = requests_of(opened)[:4]
    for request in requests:
        opened.add(request)
    for _ in range(num_steps):
        outbox.take(opened.step())
    ended = opened.abort("1")
    assert ended is not None
    outbox.take([ended])
    assert opened.abort("1") is None
    run_to_end(opened, outbox)
    assert outbox.finish_reasons("1") == {0: "abort"}
    for request in (requests[0], requests[2], requests[3]):
        assert said(outbox, request) == alone(request)
    assert_everything_is_back(opened)


def test_everyone_leaves_while_a_step_runs(opened: EngineCore) -> None:
    outbox = Outbox()
    for request in requests_of(opened)[:3]:
        opened.add(request)
    for _ in range(4):
        outbox.take(opened.step())
    assert opened.stepper._ahead is not None
    for index in range(3):
        opened.abort(str(index))
    assert not opened.has_work
    assert opened.step() == []
    again = make_request("again", random_prompt(5, seed=9), max_tokens=3)
    assert len(run(opened, again).token_ids("again")) == 3
    assert_everything_is_back(opened)


HOST_NEEDED = {
    "repetition penalty": {"repetition_penalty": 1.5},
    "presence penalty": {"presence_penalty": 1.0},
    "frequency penalty": {"frequency_penalty": 1.0},
    "grammar": {"grammar": "%llguidance {}\nstart: /[a-z]{20}/"},
}


@pytest.mark.parametrize("kind", HOST_NEEDED)
def test_a_draw_that_asks_what_came_before_waits_for_it(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]], kind: str
) -> None:
    sizes = num_ahead(opened)
    request = make_request("one", random_prompt(8, seed=3), max_tokens=9, **HOST_NEEDED[kind])
    other = make_request("other", random_prompt(7, seed=5), max_tokens=9)
    outbox = run(opened, request, other)
    assert said(outbox, request) == alone(request)
    assert said(outbox, other) == alone(other)
    assert sizes == []


def test_a_draw_waits_while_it_may_not_end(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]]
) -> None:
    sizes = num_ahead(opened)
    ends = tuple(range(0, 256, 2))
    request = make_request(
        "one", random_prompt(8, seed=3), max_tokens=12, min_tokens=4, stop_token_ids=ends
    )
    assert said(run(opened, request), request) == alone(request)
    del sizes[:]
    long = make_request("long", random_prompt(8, seed=3), max_tokens=12, min_tokens=4)
    assert said(run(opened, long), long) == alone(long)
    assert len(sizes) == 12 - 4 - 1


def test_a_step_that_cannot_run_ahead_runs_after(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(opened.runner, "run_ahead", out_of_memory)
    requests = requests_of(opened)[:3]
    outbox = run(opened, *requests)
    for request in requests:
        assert said(outbox, request) == alone(request)
    assert_everything_is_back(opened)


def test_logits_that_are_not_finite_end_their_own_request(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead = opened.runner.run_ahead
    calls: list[int] = []

    def spoiled(batch: Any, *rest: Any) -> Any:
        ran = run_ahead(batch, *rest)
        calls.append(len(batch))
        if ran is not None and len(calls) == 3:
            logits, order = ran
            ran = logits.clone(), order
            ran[0][order.index(0)] = torch.nan
        return ran

    monkeypatch.setattr(opened.runner, "run_ahead", spoiled)
    good = make_request("good", random_prompt(6, seed=8), max_tokens=8)
    bad = make_request("bad", random_prompt(5, seed=7), max_tokens=8)
    opened.add(bad)
    opened.add(good)
    outbox = run_to_end(opened, Outbox())
    failed = [request for request in (good, bad) if outbox.last(request.id).error is not None]
    assert len(failed) == 1
    (other,) = {good.id, bad.id} - {failed[0].id}
    request = good if other == "good" else bad
    assert said(outbox, request) == alone(request)
    assert_everything_is_back(opened)


def test_blocks_that_run_out_are_found_by_the_host(
    tiny: Tiny, alone: Callable[[Request], tuple[Any, ...]]
) -> None:
    """With so few that sequences are preempted, which only a scheduled step does."""
    with open_tiny(tiny, "a", "b", "c", recorder=TapeRecorder(), num_blocks=14) as core:
        sizes = num_ahead(core)
        requests = [
            make_request(f"{index}", random_prompt(7, seed=index), core.registry.select("a", index), 24)
            for index in range(4)
        ]  # fmt: skip
        outbox = run(core, *requests)
        assert core.stats().num_preemptions > 0
        for request in requests:
            assert said(outbox, request) == alone(request)
        assert sizes
        assert_everything_is_back(core)


def test_an_engine_that_records_nothing_runs_nothing_ahead(tiny: Tiny) -> None:
    with open_tiny(tiny, "a") as core:
        sizes = num_ahead(core)
        run(core, make_request("one", random_prompt(5, seed=1)))
        assert sizes == []


# ---------------------------------------------------------------- controls


def differs(
    core: EngineCore, alone: Callable[[Request], tuple[Any, ...]], *requests: Request
) -> bool:
    outbox = run(core, *requests)
    return any(said(outbox, request) != alone(request) for request in requests)


def test_control_without_asking_who_needs_the_host(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookahead, "_needs_host", lambda _: False)
    request = make_request(
        "one",
        random_prompt(8, seed=3),
        max_tokens=20,
        repetition_penalty=8.0,
        frequency_penalty=2.0,
    )
    assert differs(opened, alone, request)


def test_control_tokens_fed_to_the_wrong_rows(
    opened: EngineCore, alone: Callable[[Request], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "server.model.runner.Fed", lambda token_ids, rows: Fed(token_ids, rows[::-1])
    )
    assert differs(opened, alone, *requests_of(opened)[:4])


def test_control_a_sequence_that_ended_takes_its_extra_token(
    opened: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(9, seed=4)
    third = run(opened, make_request("free", prompt, max_tokens=8)).token_ids("free")[2]
    taken: list[int] = []

    def take_all(self: Stepper, sequences: Any, samples: Any, failures: Any) -> Any:
        for sequence, sample in zip(sequences, samples, strict=True):
            taken.append(sample.token_id)
            sequence.status = Status.RUNNING
            yield sequence.take(sample, frozenset()), sequence

    monkeypatch.setattr(Stepper, "_take", take_all)
    opened.add(make_request("stopped", prompt, max_tokens=8, stop_token_ids=(third,)))
    with pytest.raises(AssertionError):  # the detokenizer's, which had ended
        run_to_end(opened, Outbox())
    assert taken[2] == third
    assert len(taken) == 4
