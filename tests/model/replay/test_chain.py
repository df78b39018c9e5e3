"""Every operator that a chain can do, over shapes, layouts and dtypes, against torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.model.replay.noting import noted

ROTATE_WIDTH = 24


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype)


def rotate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * weight + turned * bias


OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda x, w, b: x + w,
    "add a number": lambda x, w, b: x + 0.25,
    "number first": lambda x, w, b: 3 * x,
    "sub": lambda x, w, b: x - w,
    "mul": lambda x, w, b: x * w,
    "weight first": lambda x, w, b: w * x,
    "div": lambda x, w, b: x / (w * w + 1.0),
    "neg": lambda x, w, b: -x,
    "square": lambda x, w, b: x.pow(2),
    "square itself": lambda x, w, b: x.square(),
    "rsqrt": lambda x, w, b: torch.rsqrt(x * x + 0.1),
    "sigmoid": lambda x, w, b: torch.sigmoid(x),
    "silu": lambda x, w, b: functional.silu(x),
    "tanh": lambda x, w, b: torch.tanh(x),
    "gelu": lambda x, w, b: functional.gelu(x, approximate="tanh"),
    "relu": lambda x, w, b: torch.relu(x),
    "cast": lambda x, w, b: x.to(torch.bfloat16) * 2.0,
    "layer norm": lambda x, w, b: functional.layer_norm(x, x.shape[-1:], w, b, 1e-6),
    "layer norm without weights": lambda x, w, b: functional.layer_norm(x, x.shape[-1:]),
    "rms norm": rms_norm,
    "rms norm in one": lambda x, w, b: functional.rms_norm(x, w.shape, w, 1e-6),
    "rotate": rotate,
    "gate": lambda x, w, b: functional.silu(x * w) * (x + b),
}

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Of ||chain - torch|| / ||torch||; bfloat16 may round a last bit the other way."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= TOLERANCE[expected.dtype], float(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 8, 16, 24, 64, 100])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_torch_s(name: str, width: int, dtype: torch.dtype) -> None:
    operator = OPERATORS[name]
    x = drawn(1, 5, width, dtype=dtype)
    weight, bias = drawn(width, dtype=dtype, seed=1), drawn(width, dtype=dtype, seed=2)
    program = noted(operator, x, weight, bias)
    assert program.num_calls == 0
    for seed in (0, 7):  # with the numbers it was noted with, and with others
        x.copy_(3 * drawn(1, 5, width, dtype=dtype, seed=seed))
        assert_close(program.run()[0], operator(x, weight, bias))


@pytest.mark.parametrize("name", OPERATORS)
def test_vectors_may_lie_anywhere(name: str) -> None:
    """Heads of a product that others share, transposed, and repeated along an outer dimension."""
    operator = OPERATORS[name]
    product = drawn(1, 7, 5 * 32 + 16)
    weight, bias = drawn(1, 7, 32, seed=1), drawn(1, 7, 32, seed=2)

    def of(whole: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        heads = whole[..., 16:].view(1, 7, 5, 32).transpose(1, 2)
        if name.startswith("layer norm") or name == "rms norm in one":
            return operator(heads, weight[0, 0], bias[0, 0])
        return operator(heads, weight.unsqueeze(1), bias.unsqueeze(1))

    program = noted(of, product, weight, bias)
    assert program.num_calls == 0
    product.copy_(drawn(1, 7, 5 * 32 + 16, seed=3))
    assert_close(program.run()[0], of(product, weight, bias))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_vector_s_result_does_not_depend_on_its_neighbours(name: str) -> None:
    operator = OPERATORS[name]
    x, weight, bias = drawn(1, 64, 48), drawn(48, seed=1), drawn(48, seed=2)
    whole = noted(operator, x, weight, bias, num_threads=2).run()[0].clone()
    for row in (0, 31, 63):
        alone = noted(operator, x[:, row : row + 1].clone(), weight, bias).run()[0]
        assert torch.equal(alone[0, 0], whole[0, row])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -200.0, 0.0])
@pytest.mark.parametrize("name", ["sigmoid", "silu", "tanh", "gelu", "relu", "rms norm", "cast"])
def test_extremes_are_torch_s(name: str, value: float) -> None:
    operator = OPERATORS[name]
    x, weight, bias = drawn(1, 3, 20), drawn(20, seed=1), drawn(20, seed=2)
    program = noted(operator, x, weight, bias)
    x[0, 1, 3] = value
    torch.testing.assert_close(
        program.run()[0], operator(x, weight, bias), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_small_numbers_keep_their_digits() -> None:
    """Where the plain formula of tanh cancels."""
    x = torch.logspace(-8, 0, 64).view(1, 1, 64)
    for name in ("tanh", "gelu"):
        program = noted(OPERATORS[name], x, x[0, 0], x[0, 0])
        torch.testing.assert_close(program.run()[0], OPERATORS[name](x, x, x), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("error function", lambda x: functional.gelu(x)),
        ("cube", lambda x: x.pow(3)),
        ("scaled sum", lambda x: torch.add(x, x, alpha=2)),
        ("mean over rows", lambda x: x.mean(1, keepdim=True)),
        ("mean that drops its dimension", lambda x: x.mean(-1)),
        ("rows one after the other", lambda x: torch.cat((x, x), dim=1)),
        ("number minus", lambda x: 1 - x),
        ("columns that do not lie together", lambda x: x.transpose(1, 2) * 2),
        ("double", lambda x: x.double() * 2),
    ],
)
def test_what_a_chain_cannot_do_stays_torch_s(
    name: str, function: Callable[[Tensor], Tensor]
) -> None:
    x = drawn(1, 4, 12)
    program = noted(function, x)
    assert program.num_calls > 0
    x.copy_(drawn(1, 4, 12, seed=5))
    assert torch.equal(program.run()[0], function(x))


def test_neighbours_of_one_shape_are_one_chain() -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + bias
        return hidden, rms_norm(hidden, weight, bias)

    x, weight, bias = drawn(1, 3, 32), drawn(32, seed=1), drawn(32, seed=2)
    program = noted(layer, x, weight, bias)
    assert (program.num_chains, program.num_calls) == (1, 0)
    for actual, expected in zip(program.run(), layer(x, weight, bias), strict=True):
        assert_close(actual, expected)


def test_a_view_that_is_no_part_of_a_vector_starts_another_chain() -> None:
    def function(x: Tensor, *_: Any) -> Tensor:
        return (x * 2).view(1, 3, 4, 8).transpose(1, 2) + 1

    x = drawn(1, 3, 32)
    program = noted(function, x)
    assert (program.num_chains, program.num_calls) == (2, 0)
    assert_close(program.run()[0], function(x))


def test_a_long_run_is_several_chains() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(100):
            x = x * 0.99 + 0.01
        return x

    x = drawn(1, 3, 32)
    program = noted(function, x)
    assert program.num_calls == 0
    assert program.num_chains > 1
    assert_close(program.run()[0], function(x))
