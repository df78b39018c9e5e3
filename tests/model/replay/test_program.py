"""A program runs again and again, beside others of its arena, and gives what the pass would."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.model.replay import program as program_module
from server.model.replay.program import AfterCall, Arena, Program
from server.model.replay.tape import Call, TapeWriter, noted_call
from tests.model.replay.noting import library, noted
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
    program = Program(
        writer.tape, [writer.value_of(result)], library(), 1, Arena(), lambda call: None
    )
    fails[0] = True
    with pytest.raises(RuntimeError, match="not this time"):
        program.run()
    fails[0] = False
    torch.testing.assert_close(program.run()[0], (x * 2).exp() + 1)


def test_what_belongs_behind_a_call_sees_its_output_first() -> None:
    weight, x = drawn(16, 16, seed=1), drawn(4, 16)

    def multiply(x: Tensor) -> Tensor:
        return x @ weight

    def after(call: Call) -> AfterCall | None:
        if call.function is not multiply:
            return None

        def add(args: Sequence[Any], output: Tensor) -> None:
            output.add_(args[0].sum())

        return add

    writer = TapeWriter()
    with writer:
        result = functional.relu(noted_call(multiply, x * 2))
    program = Program(writer.tape, [writer.value_of(result)], library(), 1, Arena(), after)
    expected = functional.relu((x * 2) @ weight + (x * 2).sum())
    torch.testing.assert_close(program.run()[0], expected)
