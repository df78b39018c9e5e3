"""Products with int8 weights by the compiled kernel, against float64, at every level this processor runs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from server.model.native import int8_product
from server.model.native.int8_product import NativeInt8Product, native_int8_product
from tests.model.native.levels import LEVELS, library_of

SHAPES = [(64, 16), (40, 24), (2, 16), (100, 333), (130, 600), (65, 257)]
"""out_features, in_features: less than a block, more than a panel, nothing that is a multiple."""
ROWS = [1, 2, 5, 6, 7, 13, 16, 66, 67, 131]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Of the sum of the products' sizes, which is what sums are rounded by, each output with its own scale."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Every int8 number, and scales of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(
        -128, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8
    )
    return values, torch.logspace(-4, 0, num_outputs)


def made(values: Tensor, scales: Tensor, bias: Tensor | None = None) -> NativeInt8Product:
    found = native_int8_product(values, scales, bias, torch.float32)
    assert found is not None
    return found


def assert_right(num_rows: int, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool) -> None:
    values, scales = quantized(*shape)
    bias = drawn(shape[0], seed=2) * scales if has_bias else None
    x = drawn(num_rows, shape[1], seed=1).to(dtype)
    product = made(values, scales, bias)
    assert torch.equal(product.quantized, values)
    actual = product(x)
    assert actual.dtype is dtype
    assert actual.is_contiguous()
    expected = (x.double() @ values.double().t()) * scales.double()
    sizes = (x.double().abs() @ values.double().abs().t()) * scales.double()
    if bias is not None:
        expected, sizes = expected + bias.double(), sizes + bias.double().abs()
    assert ((actual.double() - expected).abs() / sizes).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_sum_it_should_be(
    shape: tuple[int, int], num_rows: int, dtype: torch.dtype, has_bias: bool
) -> None:
    assert_right(num_rows, dtype, shape, has_bias)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_that_runs_here_is_right(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of other widths pack and share the work otherwise."""
    found = library_of(level, monkeypatch)
    monkeypatch.setattr(int8_product, "load", lambda: found)
    for num_rows in (1, 2, 7, 67):
        for dtype in TOLERANCE:
            assert_right(num_rows, dtype, (130, 600), has_bias=True)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_s_result_does_not_depend_on_the_others_or_on_threads(num_threads: int) -> None:
    product, x = made(*quantized(200, 700)), drawn(67, 700, seed=1)
    alone = [product(x[row : row + 1]) for row in range(len(x))]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_rows in (2, 6, 7, 16, 67):
            assert torch.equal(product(x[:num_rows]), torch.cat(alone[:num_rows]))
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_apart_or_across() -> None:
    values, scales = quantized(64, 32)
    product, x = made(values, scales), drawn(5, 64, seed=1)
    weight = values.float() * scales.unsqueeze(1)
    for rows in (x[:, 16:48], x[:, ::2], drawn(32, 5, seed=2).t(), x[:0, :32]):
        torch.testing.assert_close(product(rows), rows @ weight.t(), rtol=1e-4, atol=1e-4)
    batch = drawn(2, 3, 32, seed=3)
    torch.testing.assert_close(product(batch), batch @ weight.t(), rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_stays_in_its_row() -> None:
    product, x = made(*quantized(100, 48)), drawn(8, 48, seed=1)
    x[3, 7], x[5, 0] = float("nan"), float("inf")
    is_finite = product(x).isfinite().all(dim=1)
    assert is_finite.tolist() == [row not in (3, 5) for row in range(8)]


def test_other_activations_and_machines_without_a_library_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, scales = quantized(64, 16)
    assert native_int8_product(values, scales, None, torch.float16) is None
    monkeypatch.setattr(int8_product, "load", lambda: "there is none")
    assert native_int8_product(values, scales, None, torch.float32) is None
