"""Products by the compiled kernel, against float64, at every level this processor runs."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from server.model.native import product as product_module
from server.model.native.product import NativeProduct, is_available, is_fastest, native_product
from server.model.replay.tape import noted_call
from tests.model.native.levels import LEVELS, library_of
from tests.model.replay.noting import Bindable, drawn_product, noted

SHAPES = [(64, 16), (40, 24), (2, 16), (100, 333), (768, 768), (130, 2100), (65, 1025)]
"""out_features, in_features: less than a block, more than a panel, nothing that is a multiple."""
ROWS = [1, 2, 3, 4, 5, 6, 7, 13, 16, 64, 66, 67, 131]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-3}
"""Of the result's norm: bfloat16 is rounded once, at the end."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def made(weight: Tensor, bias: Tensor | None = None) -> NativeProduct:
    found = native_product(weight, bias)
    assert found is not None
    return found


def assert_right(num_rows: int, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool) -> None:
    weight, x = drawn(*shape).to(dtype), drawn(num_rows, shape[1], seed=1).to(dtype)
    bias = drawn(shape[0], seed=2).to(dtype) if has_bias else None
    product = made(weight, bias)
    assert torch.equal(product.weight, weight)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    actual = product(x)
    assert actual.dtype is dtype
    assert actual.is_contiguous()
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


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
    """Vectors of other widths lie and are summed otherwise."""
    found = library_of(level, monkeypatch)
    monkeypatch.setattr(product_module, "load", lambda: found)
    for num_rows in ROWS:
        for dtype in TOLERANCE:
            assert_right(num_rows, dtype, (130, 600), has_bias=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_s_result_does_not_depend_on_the_others_or_on_threads(
    num_threads: int, dtype: torch.dtype
) -> None:
    found, x = made(drawn(200, 1500).to(dtype)), drawn(67, 1500, seed=1).to(dtype)
    alone = [found(x[row : row + 1]) for row in range(len(x))]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_rows in (2, 16, 67):
            assert torch.equal(found(x[:num_rows]), torch.cat(alone[:num_rows]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_program_gives_the_same_bits(num_threads: int, dtype: torch.dtype) -> None:
    """Its kernel makes float32 of x itself, in memory that stays with a thread: more, less, more again."""
    products = [Bindable(made(drawn(*shape).to(dtype))) for shape in ((130, 2100), (40, 24))]
    products.append(drawn_product(130, 333))  # of int8 weights
    for num_rows in (16, 1, 67, 6):
        for product in products:
            x = drawn(num_rows, 2 * product.product.num_inputs, seed=num_rows).to(dtype)
            part = x[:, : product.product.num_inputs]
            program = noted(partial(noted_call, product), part, num_threads=num_threads)
            assert program.num_calls == 0
            for seed in range(2):
                x.copy_(drawn(*x.shape, seed=seed))
                assert torch.equal(program.run()[0], product(part))


def test_rows_may_lie_apart_or_across() -> None:
    weight, x = drawn(64, 32), drawn(5, 64, seed=1)
    found = made(weight)
    for rows in (x[:, 16:48], x[:, ::2], drawn(32, 5, seed=2).t(), x[:0, :32]):
        torch.testing.assert_close(found(rows), rows @ weight.t(), rtol=1e-5, atol=1e-5)
    batch = drawn(2, 3, 32, seed=3)
    torch.testing.assert_close(found(batch), batch @ weight.t(), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_in_its_row() -> None:
    found, x = made(drawn(100, 48)), drawn(8, 48, seed=1)
    x[3, 7], x[5, 0] = float("nan"), float("inf")
    is_finite = found(x).isfinite().all(dim=1)
    assert is_finite.tolist() == [row not in (3, 5) for row in range(8)]


def test_an_input_of_another_dtype_is_refused() -> None:
    """What a model multiplies is of one type."""
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        with pytest.raises(TypeError, match="the weight"):
            made(drawn(64, 16).to(dtype))(drawn(2, 16).to(other))


def test_other_dtypes_and_machines_without_a_library_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = drawn(64, 64)
    assert not is_available(torch.float16)
    assert native_product(weight.half(), None) is None
    monkeypatch.setattr(product_module, "load", lambda: "there is none")
    assert not is_available(torch.float32)
    assert not is_fastest(torch.float32)
    assert native_product(weight, None) is None
