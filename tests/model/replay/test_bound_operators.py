"""What a step begins and ends with, by kernels: the same as by torch, and torch's own in any other form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.model.replay import bound_operators
from tests.model.replay.noting import noted
from tests.model.replay.test_chain import drawn

TABLE = drawn(8, 4)


def rotary(positions: Tensor, frequencies: Tensor) -> Tensor:
    """As transformers has it."""
    angles = positions[:, None].to(torch.float32) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_cosines_of_positions(num_rows: int, num_threads: int) -> None:
    """As exact as torch's own, up to the end of a long context."""
    positions, frequencies = torch.arange(num_rows) * 1999, 10000.0 ** -torch.linspace(0, 1, 37)
    program = noted(rotary, positions, frequencies, num_threads=num_threads)
    assert program.num_calls == 0
    positions += 3
    exact = rotary(positions, frequencies)
    torch.testing.assert_close(program.run()[0], exact, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_of_a_table(dtype: torch.dtype, num_threads: int) -> None:
    table, indices = drawn(11, 24).to(dtype), torch.tensor([[3, 10, 0, 3]])

    def embed(indices: Tensor, table: Tensor) -> Tensor:
        return torch.nn.functional.embedding(indices, table)

    program = noted(embed, indices, table, num_threads=num_threads)
    assert program.num_calls == 0
    indices.copy_(torch.tensor([[7, 7, 1, 10]]))
    assert torch.equal(program.run()[0], embed(indices, table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 3, 16, 71])
@pytest.mark.parametrize("shape", [(64, 32), (131, 45), (3, 7)])
def test_a_product_of_weights_that_lie_as_in_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    num_rows: int,
    num_threads: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(bound_operators, "is_multiplied_here", lambda dtype: True)
    weight, x = drawn(*shape, seed=1).to(dtype), drawn(1, num_rows, shape[1]).to(dtype)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    program = noted(multiply, x, weight, num_threads=num_threads)
    assert program.num_calls == 0
    x.copy_(drawn(*x.shape, seed=2))
    exact = (x.double() @ weight.double().t()).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(program.run()[0], exact, rtol=tolerance, atol=tolerance)


def test_a_row_of_such_a_product_is_the_same_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_operators, "is_multiplied_here", lambda dtype: True)
    weight, x = drawn(131, 45, seed=1).float(), drawn(1, 70, 45).float()
    (together,) = noted(torch.nn.functional.linear, x, weight, num_threads=2).run()
    for row in (0, 3, 6, 69):
        (alone,) = noted(torch.nn.functional.linear, x[:, row : row + 1].clone(), weight).run()
        assert torch.equal(alone[0, 0], together[0, row])


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (lambda x: torch.nn.functional.linear(x, TABLE, TABLE[:, 0]), drawn(3, 4)),
        (lambda x: torch.nn.functional.linear(x, TABLE[:, :2]), drawn(3, 2)),
        (lambda x: torch.nn.functional.linear(x, TABLE), drawn(3, 8)[:, :4]),
        (torch.cos, drawn(6, 4).t()),
        (torch.sin, drawn(6, 4)[:, ::2]),
        (torch.cos, drawn(6, 4).double()),
        (lambda x: x.to(torch.float64), torch.arange(6)),
        (lambda x: x.to(torch.float32), torch.arange(6, dtype=torch.int32)),
        (lambda x: torch.nn.functional.embedding(x, TABLE.t()), torch.arange(3)),
        (lambda x: torch.nn.functional.embedding(x, TABLE), torch.arange(3).int()),
    ],
)
def test_what_lies_otherwise_stays_torchs(
    function: Callable[[Tensor], Tensor], given: Tensor
) -> None:
    program = noted(function, given)
    assert program.num_calls == 1
    torch.testing.assert_close(program.run()[0], function(given))
