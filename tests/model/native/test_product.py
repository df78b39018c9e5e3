"""Products by the compiled kernel, against float64, and which packed weights it is trusted with."""

from typing import Any

import pytest
import torch
from torch import Tensor

from server.model.native import product as product_module
from server.model.native.library import Library, load
from server.model.native.product import is_understood, native_product

SHAPES = [(64, 16), (40, 24), (2, 16), (100, 333), (768, 768), (130, 2100), (65, 1025)]
"""out_features, in_features: less than a block, more than a panel, nothing that is a multiple."""
ROWS = [1, 2, 5, 6, 7, 13, 16, 64, 66, 67, 131]

pytestmark = pytest.mark.skipif(
    not isinstance(found := load(), Library) or found.level != "x86-64-v4",
    reason="oneDNN packs otherwise on this processor",
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return result


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_sum_it_should_be(
    shape: tuple[int, int], num_rows: int, has_bias: bool
) -> None:
    weight, x = drawn(*shape), drawn(num_rows, shape[1], seed=1)
    bias = drawn(shape[0], seed=2) if has_bias else None
    whole = packed(weight)
    found = native_product(whole, bias, weight)
    assert found is not None
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    actual = found(x)
    assert actual.is_contiguous()
    assert (actual - expected).norm() <= 5e-6 * expected.norm()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_s_result_does_not_depend_on_the_others_or_on_threads(num_threads: int) -> None:
    weight, x = drawn(200, 1500), drawn(67, 1500, seed=1)
    whole = packed(weight)
    found = native_product(whole, None, weight)
    assert found is not None
    alone = [found(x[row : row + 1]) for row in range(len(x))]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_rows in (2, 16, 67):
            assert torch.equal(found(x[:num_rows]), torch.cat(alone[:num_rows]))
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_apart_or_across() -> None:
    weight, x = drawn(64, 32), drawn(5, 64, seed=1)
    whole = packed(weight)
    found = native_product(whole, None, weight)
    assert found is not None
    for rows in (x[:, 16:48], x[:, ::2], drawn(32, 5, seed=2).t(), x[:0, :32]):
        torch.testing.assert_close(found(rows), rows @ weight.t(), rtol=1e-5, atol=1e-5)
    batch = drawn(2, 3, 32, seed=3)
    torch.testing.assert_close(found(batch), batch @ weight.t(), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight, x = drawn(100, 48), drawn(8, 48, seed=1)
    x[3, 7], x[5, 0] = float("nan"), float("inf")
    whole = packed(weight)
    found = native_product(whole, None, weight)
    assert found is not None
    is_finite = found(x).isfinite().all(dim=1)
    assert is_finite.tolist() == [row not in (3, 5) for row in range(8)]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_weight_that_lies_otherwise_is_not_understood(block: int) -> None:
    weight = drawn(192, 32)
    assert is_understood(packed(weight), weight)
    other = weight.clone()
    other[64 * block + 5, 3] += 1
    assert not is_understood(packed(weight), other)


def test_a_layout_for_one_row_is_not_understood() -> None:
    """oneDNN then leaves it row by row."""
    weight = drawn(128, 64)
    plain = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    assert not is_understood(plain, weight)
    assert native_product(plain, None, weight) is None


def test_other_processors_keep_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(64, 64)
    monkeypatch.setattr(product_module, "load", lambda: "there is none")
    assert native_product(packed(weight), None, weight) is None
