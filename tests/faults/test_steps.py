"""Steps that raise, run out of memory or make NaN: whoever is at fault ends, and nobody else notices.

Faults are put into real layers of the model. What the others say is compared with what they say in an
engine that nothing ever happened to. Controls take away what is tested, and the comparison fails.
"""

import weakref
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from server.engine.core import EngineCore
from server.engine.request import Request
from server.engine.row_state import RowState
from server.engine.scheduler import Scheduler
from server.engine.stepper import Stepper
from server.errors import DeviceLost, GenerationError
from server.model import faults
from server.model.batch import BatchedSequence
from server.model.runner import _packing_key
from tests.model.tape import TapeRecorder
from tests.parity.zoo import NUM_LAYERS, random_prompt
from tests.tiny import (
    BASE,
    Outbox,
    Tiny,
    assert_everything_is_back,
    load_tiny,
    make_request,
    open_tiny,
    run,
    run_to_end,
)

ADAPTERS = ("a", "b", "c")
SHARED = random_prompt(12, seed=50)
"""Several prompts begin with it: the prefix cache is at work between them."""
SEEDED = {"temperature": 1.0, "seed": 7}


def requests_of(core: EngineCore) -> list[Request]:
    """Greedy and seeded, deep and base, long prompts in chunks and short ones; `bad` is one of them."""
    select = core.registry.select
    return [
        make_request("bad", (*SHARED, *random_prompt(9, seed=1)), select("a", 2)),
        make_request("same prefix", (*SHARED, *random_prompt(5, seed=2)), select("a", 2)),
        make_request("other depth", (*SHARED, 3), select("a", 4), **SEEDED),
        make_request("dora", random_prompt(7, seed=3), select("c", 3)),
        make_request("base", random_prompt(19, seed=4), BASE, n=2, **SEEDED),
        make_request("short", random_prompt(2, seed=5), select("b", 1)),
    ]


Said = dict[str, list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny) -> Said:
    """What each says where nothing goes wrong, on a model of its own."""
    with open_tiny(load_tiny(tiny.model_path, tiny.adapter_root), *ADAPTERS, num_blocks=96) as core:
        requests = requests_of(core)
        return said(run(core, *requests), requests)


def said(outbox: Outbox, requests: list[Request]) -> Said:
    return {
        each.id: [outbox.token_ids(each.id, index) for index in range(each.sampling.n)]
        for each in requests
    }


def without(name: str, what: Said) -> Said:
    return {key: value for key, value in what.items() if key != name}


class Fault:
    """Something that happens in one layer whenever one sequence is in the step, from its n-th on."""

    def __init__(self, core: EngineCore, request_id: str, layer_idx: int, first: int) -> None:
        self.is_on = True
        self.num_times = 0
        self._core = core
        self._request_id = request_id
        self._first = first
        self._num_steps = 0
        self._rows: list[int] = []
        self._run = core.runner.run
        core.runner.run = self._noting  # type: ignore[method-assign]
        layer = core.runner.model.model.layers[layer_idx]
        self._handle = layer.register_forward_hook(self._hook)

    def happen(self, output: Any, rows: list[int]) -> Any:
        raise NotImplementedError

    def remove(self) -> None:
        self._handle.remove()
        del self._core.runner.run  # type: ignore[method-assign]

    def _noting(self, batch: list[BatchedSequence]) -> Any:
        """Where in the packed step the rows of the sequence at fault lie."""
        group = self._core._groups.get(self._request_id)
        table = None if group is None else group.sequences[0].block_table
        self._rows, start = [], 0
        for sequence in sorted(batch, key=_packing_key):
            if sequence.block_table is table:
                self._rows = list(range(start, start + len(sequence.token_ids)))
            start += len(sequence.token_ids)
        self._num_steps += bool(self._rows)
        return self._run(batch)

    def _hook(self, _module: object, _args: object, output: Any) -> Any:
        if self.is_on and self._rows and self._num_steps > self._first:
            self.num_times += 1
            return self.happen(output, self._rows)
        return output


class Raising(Fault):
    def happen(self, output: Any, rows: list[int]) -> Any:
        raise RuntimeError("this layer does not work")


class NotFinite(Fault):
    def happen(self, output: Any, rows: list[int]) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        spoiled = hidden.clone()
        spoiled[0, rows] = torch.nan
        return (spoiled, *output[1:]) if isinstance(output, tuple) else spoiled


CASES = [
    pytest.param(
        kind,
        Random(seed).randrange(NUM_LAYERS),
        Random(seed + 50).randrange(5),
        marks=[pytest.mark.slow] if seed >= 3 else [],
    )
    for kind in (Raising, NotFinite)
    for seed in range(20)
]


@pytest.mark.parametrize(("kind", "layer_idx", "first"), CASES)
def test_a_fault_in_any_layer_ends_one_request_and_touches_no_other(
    tiny: Tiny, undisturbed: Said, kind: type[Fault], layer_idx: int, first: int
) -> None:
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        requests = requests_of(core)
        fault = kind(core, "bad", layer_idx, first)
        outbox = run(core, *requests)
        assert fault.num_times > 0
        fault.remove()
        assert isinstance(outbox.last("bad").error, GenerationError)
        assert outbox.finish_reasons("bad") == {0: "error"}
        (got,) = said(outbox, requests)["bad"]
        assert got == undisturbed["bad"][0][: len(got)]
        assert without("bad", said(outbox, requests)) == without("bad", undisturbed)
        # Whoever asks the same again is not given what the failed one left in the cache.
        again = run(core, *requests)
        assert said(again, requests) == undisturbed
        assert_everything_is_back(core)


def spoil_a_chunk_and_ask_again(tiny: Tiny) -> tuple[Outbox, Outbox]:
    """NaN in the first chunk of a prompt only, whose logits nobody asks for."""
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        request = requests_of(core)[0]
        fault = NotFinite(core, "bad", 1, first=0)
        core.add(request)
        outbox = Outbox()
        outbox.take(core.step())
        assert fault.num_times == 1
        fault.is_on = False
        outbox.take([last for last in [core.abort("bad")] if last is not None])
        fault.remove()
        return outbox, run(core, request)


def test_a_chunk_that_is_not_finite_is_shared_with_nobody(tiny: Tiny, undisturbed: Said) -> None:
    """Its request was aborted before any logit could tell."""
    aborted, again = spoil_a_chunk_and_ask_again(tiny)
    assert aborted.last("bad").error is None
    assert again.last("bad").error is None
    assert [again.token_ids("bad")] == undisturbed["bad"]


def test_control_a_chunk_that_nobody_looked_at_poisons_the_cache(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Stepper, "_share_chunk", lambda self, sequence: self._scheduler.publish(sequence)
    )
    _, again = spoil_a_chunk_and_ask_again(tiny)
    assert isinstance(again.last("bad").error, GenerationError)


@pytest.mark.parametrize("is_healed", [True, False])
def test_a_cache_that_is_spoiled_all_the_same_heals_with_the_first_who_fails(
    tiny: Tiny, undisturbed: Said, monkeypatch: pytest.MonkeyPatch, is_healed: bool
) -> None:
    """Memory may change while nobody looks. The control never forgets, and fails for ever."""
    if not is_healed:
        monkeypatch.setattr(Scheduler, "distrust", lambda *_: None)
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        request = requests_of(core)[0]
        run(core, request)
        core.runner.cache.values[2].fill_(torch.nan)
        assert isinstance(run(core, request).last("bad").error, GenerationError)
        core.runner.cache.values[2].nan_to_num_(0.0)  # as blocks are that somebody writes anew
        again = run(core, request)
        assert ([again.token_ids("bad")] == undisturbed["bad"]) == is_healed


def test_an_error_that_goes_away_fails_nobody(tiny: Tiny, undisturbed: Said) -> None:
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        requests = requests_of(core)
        random, run_step = Random(3), core.runner.run
        num_raised = 0

        def flaky(batch: list[BatchedSequence]) -> Any:
            nonlocal num_raised
            if len(batch) > 1 and random.random() < 0.5:
                num_raised += 1
                raise RuntimeError("not this time")
            return run_step(batch)

        core.runner.run = flaky  # type: ignore[method-assign]
        assert said(run(core, *requests), requests) == undisturbed
        assert num_raised > 5
        assert_everything_is_back(core)


def test_finding_one_among_many_takes_few_steps(tiny: Tiny) -> None:
    """Halves: about two logarithms of them, and not as many as there are sequences."""
    with open_tiny(tiny, num_blocks=128, max_num_seqs=32, max_num_batched_tokens=64) as core:
        fault = Raising(core, "5", layer_idx=1, first=1)
        outbox, num_steps = Outbox(), 0
        run_step = core.runner.run

        def counted(batch: list[BatchedSequence]) -> Any:
            nonlocal num_steps
            num_steps += 1
            return run_step(batch)

        for index in range(32):
            core.add(make_request(f"{index}", random_prompt(2, seed=index), max_tokens=4))
        outbox.take(core.step())
        core.runner.run = counted  # type: ignore[method-assign]
        outbox.take(core.step())
        assert outbox.last("5").error is not None
        assert num_steps == 11
        run_to_end(core, outbox)
        fault.remove()


# ---------------------------------------------------------------- too little memory


def too_little(core: EngineCore, max_tokens: int, error: BaseException) -> list[int]:
    """Steps of more tokens than these find no memory; sizes of those that were tried."""
    sizes: list[int] = []
    run_step = core.runner.run

    def limited(batch: list[BatchedSequence]) -> Any:
        sizes.append(sum(len(sequence.token_ids) for sequence in batch))
        if sizes[-1] > max_tokens:
            raise error
        return run_step(batch)

    core.runner.run = limited  # type: ignore[method-assign]
    return sizes


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_step_too_large_for_the_memory_is_run_in_parts(
    tiny: Tiny, undisturbed: Said, error: BaseException, max_tokens: int
) -> None:
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        requests = requests_of(core)
        sizes = too_little(core, max_tokens, error)
        outbox = run(core, *requests)
        assert all(outbox.last(each.id).error is None for each in requests)
        assert said(outbox, requests) == undisturbed
        assert max(sizes) > max_tokens
        assert_everything_is_back(core)


def test_prompt_logprobs_survive_a_prompt_in_pieces(tiny: Tiny) -> None:
    with open_tiny(tiny, "a", num_blocks=96) as core:
        request = make_request("x", SHARED, core.registry.select("a", 2), prompt_logprobs=1)
        whole = run(core, request).outputs["x"]
        too_little(core, 3, MemoryError())
        pieces = run(core, request).outputs["x"]
        (one,), (other,) = (
            [each.prompt_logprobs for each in outputs if each.prompt_logprobs]
            for outputs in (whole, pieces)
        )
        assert len(one) == len(other) == len(SHARED)
        for scored, same in zip(one[1:], other[1:], strict=True):
            assert scored is not None
            assert same is not None
            assert scored.token_id == same.token_id
            assert scored.logprob == pytest.approx(same.logprob, abs=1e-4)


def test_control_whoever_takes_it_for_any_error_fails_prompts(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "is_out_of_memory", lambda _: False)
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        too_little(core, 1, MemoryError())
        outbox = run(core, *requests_of(core))
        assert all(outbox.last(each.id).error is not None for each in requests_of(core))


def test_memory_of_the_failed_step_is_free_when_its_parts_run(tiny: Tiny) -> None:
    """An exception keeps the frames that raised it, and they what they computed."""
    with open_tiny(tiny, num_blocks=96) as core:
        run_step = core.runner.run
        held: list[weakref.ref[torch.Tensor]] = []
        is_held: list[bool] = []

        def greedy_for_memory(batch: list[BatchedSequence]) -> Any:
            is_held.append(any(each() is not None for each in held))
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            if len(batch) > 1:
                raise torch.OutOfMemoryError("no memory")
            return run_step(batch)

        core.runner.run = greedy_for_memory  # type: ignore[method-assign]
        run(core, *(make_request(f"{i}", random_prompt(3, seed=i), max_tokens=2) for i in range(3)))
        assert len(is_held) > 6
        assert not any(is_held)


def test_who_does_not_fit_alone_fails_alone_after_a_second_try(
    tiny: Tiny, undisturbed: Said
) -> None:
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        requests = requests_of(core)
        tries: list[int] = []

        class NoMemory(Fault):
            def happen(self, output: Any, rows: list[int]) -> Any:
                tries.append(len(rows))
                raise torch.OutOfMemoryError("no memory")

        fault = NoMemory(core, "bad", layer_idx=2, first=2)
        outbox = run(core, *requests)
        fault.remove()
        assert isinstance(outbox.last("bad").error, GenerationError)
        assert tries[-2:] == [1, 1]
        assert without("bad", said(outbox, requests)) == without("bad", undisturbed)
        assert_everything_is_back(core)


# ---------------------------------------------------------------- drawing


def breaks_while_drawing(core: EngineCore, when: Callable[[list[RowState]], bool]) -> None:
    """Raise after the numbers were drawn, as a device does that runs out of memory just then."""
    launch = core.stepper.sampler.launch

    def broken(logits: torch.Tensor, rows: list[RowState], masks: Any) -> Any:
        launched = launch(logits, rows, masks)
        if when(rows):
            raise torch.OutOfMemoryError("no memory")
        return launched

    core.stepper.sampler.launch = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("is_rewound", [True, False])
def test_numbers_drawn_in_vain_are_drawn_again(
    tiny: Tiny, undisturbed: Said, monkeypatch: pytest.MonkeyPatch, is_rewound: bool
) -> None:
    """Seeded requests say what they always say. The control goes on with the next number."""
    if not is_rewound:
        monkeypatch.setattr(RowState, "rewind", lambda *_: None)
    with open_tiny(tiny, *ADAPTERS, num_blocks=96) as core:
        breaks_while_drawing(core, lambda rows: len(rows) > 1)
        requests = requests_of(core)
        assert (said(run(core, *requests), requests) == undisturbed) == is_rewound


@pytest.mark.parametrize("method", ["launch", "read"])
def test_a_step_run_ahead_that_fails_is_run_again(
    tiny: Tiny, undisturbed: Said, method: str
) -> None:
    """On a device that records its steps, where the next is launched before this one is read."""
    with open_tiny(tiny, *ADAPTERS, num_blocks=96, recorder=TapeRecorder()) as core:
        requests = requests_of(core)
        original = getattr(core.stepper.sampler, method)
        num_calls = num_raised = 0

        def flaky(*args: Any) -> Any:
            nonlocal num_calls, num_raised
            result = original(*args)
            num_calls += 1
            if num_calls % 4 == 0:
                num_raised += 1
                raise RuntimeError("not this time")
            return result

        setattr(core.stepper.sampler, method, flaky)
        outbox = run(core, *requests)
        assert all(outbox.last(each.id).error is None for each in requests)
        assert said(outbox, requests) == undisturbed
        assert num_raised > 2
        assert_everything_is_back(core)


# ---------------------------------------------------------------- a device that is gone


def test_on_a_lost_device_nobody_is_blamed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tiny(tiny, num_blocks=96) as core:
        run_step = core.runner.run

        def lost(batch: list[BatchedSequence]) -> Any:
            monkeypatch.setattr(core.runner, "is_device_lost", lambda: True)
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        core.add(make_request("x", SHARED, max_tokens=4))
        core.step()
        monkeypatch.setattr(core.runner, "run", lost)
        with pytest.raises(DeviceLost, match="illegal memory access"):
            run_to_end(core, Outbox())
        monkeypatch.setattr(core.runner, "run", run_step)


def test_a_device_that_answers_is_not_lost() -> None:
    assert not faults.is_device_lost(torch.device("cpu"))
    assert faults.is_device_lost(torch.device("meta"))  # nothing can be read back from it


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        *((error, True) for error in NO_MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_too_little_memory(error: BaseException, is_memory: bool) -> None:
    assert faults.is_out_of_memory(error) == is_memory
