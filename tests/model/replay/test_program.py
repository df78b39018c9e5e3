"""A program runs again and again, beside others of its arena, and gives what the pass would."""

import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.model.lora import LoraWeights
from server.model.native.lora import BoundLora, NativeLora, Part, Scratch
from server.model.native.structures import Pass
from server.model.replay import program as program_module
from server.model.replay.bound import Bound
from server.model.replay.program import Arena, Program
from server.model.replay.tape import Call, NotReplayable, TapeWriter, Value, noted_call
from server.model.segments import ReachedRows, Segment
from tests.model.replay.noting import drawn_product, int8_product, library, noted, program_of
from tests.model.replay.test_chain import drawn


@pytest.fixture(autouse=True)
def _as_the_runner_does() -> Iterator[None]:
    with torch.inference_mode():
        yield


def block(x: Tensor, weight: Tensor) -> Tensor:
    """Products and chains in turn, one of them changed in place."""
    for _ in range(3):
        hidden = functional.silu(x @ weight) * (x + 1)
        hidden.clamp_(-2, 2)
        x = x + torch.sort(hidden, dim=-1)[0] * 0.5
    return x


def test_every_run_is_of_what_the_given_tensors_hold() -> None:
    x, weight = drawn(1, 4, 32), drawn(32, 32, seed=1) / 8
    program = noted(block, x, weight)
    assert program.num_chains > 1
    assert program.num_calls > 1
    for seed in range(5):
        x.copy_(drawn(1, 4, 32, seed=seed))
        torch.testing.assert_close(program.run()[0], block(x, weight), rtol=1e-5, atol=1e-5)


def test_who_is_called_before_is_called_while_the_most_kernels_compute() -> None:
    """By this thread, and when torch's operators before them are done."""
    x, weight = drawn(1, 4, 32), drawn(32, 32, seed=1) / 8
    program = noted(block, x, weight)
    ran: list[str] = []
    for index, step in enumerate(program._steps):
        program._steps[index] = lambda index=index, step=step: (ran.append(f"{index}"), step())
    thread = threading.get_ident()
    program.run(lambda: ran.append("before" if threading.get_ident() == thread else "elsewhere"))
    assert sorted(ran) == sorted([*map(str, range(len(program._steps))), "before"])
    longest = ran[ran.index("before") - 1]
    ran.clear()
    program.run()
    assert "before" not in ran
    program.run(lambda: ran.append("before"))
    assert ran[ran.index("before") - 1] == longest != "0"


def test_what_it_raises_is_raised_when_the_kernels_are_done() -> None:
    x, weight = drawn(1, 4, 32), drawn(32, 32, seed=1) / 8
    program = noted(block, x, weight)

    def fail() -> None:
        raise ValueError("of who is called")

    with pytest.raises(ValueError, match="of who is called"):
        program.run(fail)
    torch.testing.assert_close(program.run()[0], block(x, weight), rtol=1e-5, atol=1e-5)


def test_it_is_called_where_nothing_is_compiled() -> None:
    x = drawn(4, 8)
    program = noted(lambda x: torch.sort(x, dim=-1)[0], x)
    called: list[int] = []
    program.run(lambda: called.append(1))
    assert called == [1]


def test_programs_of_one_arena_do_not_disturb_each_other() -> None:
    """Smaller ones first, so that the arena grows under those that were there."""
    arena, weight = Arena(), drawn(32, 32, seed=1) / 8
    inputs = [drawn(1, num_rows, 32, seed=num_rows) for num_rows in (1, 5, 40, 3)]
    programs = [noted(block, x, weight, arena=arena) for x in inputs]
    for _ in range(2):
        for x, program in zip(inputs, programs, strict=True):
            torch.testing.assert_close(program.run()[0], block(x, weight), rtol=1e-5, atol=1e-5)


def test_memory_is_used_again_only_when_its_readers_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def held(x: Tensor) -> Tensor:
        doubled = x * 2
        first = doubled.exp()
        second = (x * 3).exp()
        return first - second + doubled

    x = drawn(8, 8)
    torch.testing.assert_close(noted(held, x).run()[0], held(x))

    # The control: memory that is free at once is written to while it is needed.
    def over_at_once(steps: list[object], _results: object) -> list[list[int]]:
        return [[value.root for value in getattr(step, "stores", ())] for step in steps]

    monkeypatch.setattr(program_module, "over_after", over_at_once)
    assert not torch.allclose(noted(held, x).run()[0], held(x))


def test_nothing_is_kept_of_a_run() -> None:
    x = drawn(4, 32)
    program = noted(lambda x: (x @ x.t()).exp() @ x, x)
    program.run()
    assert program._made == {}


def test_a_call_that_raises_leaves_a_program_that_runs() -> None:
    fails = [False]

    def attend(x: Tensor) -> Tensor:
        if fails[0]:
            raise RuntimeError("not this time")
        return x.exp()

    x = drawn(1, 16)
    writer = TapeWriter()
    with writer:
        result = writer.call(attend, x * 2) + 1
    program = program_of(writer, result)
    fails[0] = True
    with pytest.raises(RuntimeError, match="not this time"):
        program.run()
    fails[0] = False
    torch.testing.assert_close(program.run()[0], (x * 2).exp() + 1)


class TestLoraBehindAProduct:
    """Whoever multiplies, LoRA stands between the product and what reads it."""

    NUM_ROWS = 4

    @staticmethod
    def lora(seed: int) -> LoraWeights:
        return LoraWeights(drawn(3, 64, seed=seed), drawn(32, 3, seed=seed + 1), 0.5)

    @pytest.fixture(params=["by torch", "by a kernel"])
    def behind(self, request: pytest.FixtureRequest) -> None:
        """A program with LoRA behind its product, for `run`."""
        weight = drawn(32, 64, seed=1).to(torch.float32)
        if request.param == "by torch":
            self.multiply: Any = lambda x: x @ weight.t()
        else:
            quantized, scales = (weight * 40).round().to(torch.int8), torch.full((32,), 1 / 40)
            weight = quantized * scales.unsqueeze(1)
            self.multiply = int8_product(quantized, scales)
        self.weight = weight
        self.x = drawn(self.NUM_ROWS, 64)
        self.told, self.bound = Pass(), []
        writer = TapeWriter()
        with writer:
            result = functional.relu(noted_call(self.multiply, self.x * 2)) + 1

        def after(call: Call) -> Bound | None:
            if call.function is not self.multiply:
                return None
            (x,), (y,) = call.inputs, call.outputs
            assert y is not None
            self.bound.append(BoundLora(x, y))
            return self.bound[0]

        self.program = program_of(writer, result, told=self.told, after=after)

    def run(self, native: NativeLora | None, rows: ReachedRows | None) -> Tensor:
        (bound,) = self.bound
        scratch = Scratch()
        self.told.low = scratch.address(self.NUM_ROWS * bound.use(native, 1))
        layers = [] if rows is None else [ReachedRows(), rows]
        reached = array("q", [number for layer in layers for number in layer.location])
        self.told.reached = reached.buffer_info()[0] if reached else None
        return self.program.run()[0].clone()

    def expected(self, lora: LoraWeights | None, rows: Sequence[int] = ()) -> Tensor:
        product = self.x * 2 @ self.weight.t()
        if lora is not None:
            delta = self.x * 2 @ lora.lora_A.t() @ lora.lora_B.t() * lora.scaling
            product[list(rows)] += delta[list(rows)]
        return functional.relu(product) + 1

    def test_of_the_rows_that_reach_its_layer(self, behind: None) -> None:
        lora = self.lora(5)
        native = NativeLora(library(), [Part({2: lora}, None)])
        rows = ReachedRows([Segment(2, 1, 3), Segment(7, 3, 4)])  # nobody is in slot 7
        expected = self.expected(lora, [1, 2])
        torch.testing.assert_close(self.run(native, rows), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, self.expected(None), atol=1e-2)

    def test_which_may_be_others_in_the_next_run(self, behind: None) -> None:
        rows, everybody = ReachedRows([Segment(0, 0, 4)]), range(self.NUM_ROWS)
        for seed in (5, 9):
            lora = self.lora(seed)
            native = NativeLora(library(), [Part({0: lora}, None)])
            actual = self.run(native, rows)
            expected = self.expected(lora, everybody)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        base = self.expected(None)
        for nobody in (
            self.run(None, rows),
            self.run(native, None),
            self.run(native, ReachedRows()),
        ):
            torch.testing.assert_close(nobody, base, rtol=1e-4, atol=1e-4)


class TestWhatKernelsDoInARow:
    """It is one call, for which Python has nothing to do."""

    @pytest.fixture
    def lengths(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Of each row of kernels that a program makes."""
        found: list[int] = []
        kernels = Program._kernels

        def counted(self: Program, steps: Sequence[Bound], *, is_longest: bool) -> Any:
            found.append(len(steps))
            return kernels(self, steps, is_longest=is_longest)

        monkeypatch.setattr(Program, "_kernels", counted)
        return found

    def test_products_and_chains(self, lengths: list[int]) -> None:
        product = drawn_product(48, 48)

        def layers(x: Tensor) -> Tensor:
            for _ in range(5):
                x = x + functional.silu(noted_call(product, x))
            return x

        x = drawn(2, 3, 48)
        program = noted(layers, x)
        assert lengths == [10]
        assert program.num_calls == 0
        torch.testing.assert_close(program.run()[0], layers(x))

    def test_up_to_what_torch_does(self, lengths: list[int]) -> None:
        product = drawn_product(32, 32)

        def sorted_between(x: Tensor) -> Tensor:
            x = noted_call(product, x * 2) + 1
            x = torch.sort(x, dim=-1)[0]  # new memory in each run, which the next kernel finds
            return noted_call(product, x[1:]) + x[:-1]

        x = drawn(4, 32)
        program = noted(sorted_between, x)
        assert lengths == [3, 2]
        for seed in range(3):
            x.copy_(drawn(4, 32, seed=seed))
            torch.testing.assert_close(program.run()[0], sorted_between(x))

    def test_a_product_of_rows_that_do_not_lie_evenly_is_called(self, lengths: list[int]) -> None:
        product = drawn_product(16, 16)
        x = drawn(2, 16, 3)
        program = noted(lambda x: noted_call(product, (x + 1).transpose(1, 2)) * 2, x)
        assert program.num_calls == 1
        expected = product((x + 1).transpose(1, 2)) * 2
        torch.testing.assert_close(program.run()[0], expected)


def test_lora_behind_rows_that_do_not_lie_evenly_cannot_be_replayed() -> None:
    uneven = Value(0, (2, 3, 16), (100, 16, 1), 0, torch.float32)
    even = Value(1, (2, 3, 16), (48, 16, 1), 0, torch.float32)
    BoundLora(even, even)
    for pair in ((uneven, even), (even, uneven)):
        with pytest.raises(NotReplayable, match="do not lie evenly"):
            BoundLora(*pair)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((4, 8), (8, 1), 8),
        ((1, 4, 8), (999, 20, 1), 20),
        ((2, 4, 8), (80, 20, 1), 20),
        ((2, 4, 8), (81, 20, 1), None),
        ((2, 1, 8), (81, 5, 1), 81),
        ((4, 8), (1, 4), None),
        ((4, 1), (3, 7), 3),
        ((1, 1, 8), (3, 7, 1), 8),
        ((8,), (1,), 8),
        ((), (), None),
    ],
)
def test_rows_that_lie_evenly(
    size: tuple[int, ...], stride: tuple[int, ...], expected: int | None
) -> None:
    assert Value(0, size, stride, 0, torch.float32).row_stride == expected
