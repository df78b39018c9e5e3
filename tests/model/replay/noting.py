"""A function of tensors as a program, as `server.model.replay.step_replay` makes one of a model."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from server.model.native.int8_product import NativeInt8Product
from server.model.native.library import Library, load
from server.model.native.rows_product import RowsProduct
from server.model.native.structures import Pass
from server.model.replay.bound import Bound
from server.model.replay.bound_steps import bound_steps
from server.model.replay.program import Arena, Program
from server.model.replay.tape import Call, Tape, TapeWriter, Value


def library() -> Library:
    """Of this machine; a test without one has nothing to test."""
    found = load()
    if isinstance(found, str):
        pytest.fail(found)
    return found


class Bindable:
    """A kernel's product as a model's module calls it, and a program binds it."""

    def __init__(self, product: RowsProduct) -> None:
        self.product = product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)

    def bind(self, call: Call) -> Bound | None:
        (x,), (y,) = call.inputs, call.outputs
        assert y is not None
        return self.product.bind(x, y)


def int8_product(quantized: Tensor, scales: Tensor) -> Bindable:
    """Which is a kernel's on every processor."""
    return Bindable(NativeInt8Product(library(), quantized, scales, None))


def drawn_product(num_outputs: int, num_inputs: int) -> Bindable:
    """One of those, of random weights."""
    weight = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(3))
    return int8_product((weight * 30).round().to(torch.int8), torch.full((num_outputs,), 0.01))


def program_of(
    writer: TapeWriter,
    *results: Tensor,
    arena: Arena | None = None,
    num_threads: int = 1,
    told: Pass | None = None,
    after: Callable[[Call], Bound | None] = lambda call: None,
) -> Program:
    """What was noted, with these of its tensors as results."""
    values = [writer.value_of(result) for result in results]
    steps = bound_steps(writer.tape, values, after)
    given = writer.tape.given
    return Program(steps, given, values, library(), num_threads, arena or Arena(), told or Pass())


@torch.inference_mode()
def noted(
    function: Callable[..., Tensor | Sequence[Tensor]],
    *given: Tensor,
    arena: Arena | None = None,
    num_threads: int = 1,
) -> Program:
    """What `function` does with these very tensors, which may hold other numbers later."""
    writer = TapeWriter()
    with writer:
        result = function(*given)
    results = [result] if isinstance(result, Tensor) else result
    return program_of(writer, *results, arena=arena, num_threads=num_threads)


def noted_twice(
    function: Callable[[Tensor], Tensor], memory: Tensor, num_rows: int
) -> tuple[list[Tape], tuple[list[Call | Bound], list[Call | Bound]], list[Value]]:
    """Over so many first rows of `memory`, and one more: tapes, what became of them, the first's result."""
    tapes, steps, results = [], [], []
    for more in range(2):
        writer = TapeWriter()
        with writer:
            result = function(memory[: num_rows + more])
        tapes.append(writer.tape)
        results.append(writer.value_of(result))
        steps.append(bound_steps(writer.tape, results[-1:], lambda call: None))
    return tapes, (steps[0], steps[1]), results[:1]
