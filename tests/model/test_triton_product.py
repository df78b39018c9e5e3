"""The product of one row in Triton against torch's: in its interpreter, on a GPU as it is."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip(
    "triton",
    reason="no triton, which the dev extra installs on Linux x86-64: its kernels are not tested",
)

from server.model.replay.tape import TapeWriter
from server.model.replay.triton_kernels import TritonKernels
from server.model.triton_product import multiply_row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest ||Triton's - float64|| / ||float64||. The interpreter cuts bfloat16 off."""


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 64), (7, 75), (33, 2100)])
def test_a_row_times_a_weight(
    out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 1, in_features, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(out_features, generator=generator).to(DEVICE, dtype) if has_bias else None
    actual = multiply_row(row, weight, bias)
    expected = functional.linear(
        row.double(), weight.double(), None if bias is None else bias.double()
    )
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert float((actual.double() - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("rows", "dtype", "is_transposed", "is_served"),
    [
        (1, torch.float32, False, True),
        (1, torch.bfloat16, False, True),
        (2, torch.float32, False, False),
        (1, torch.float64, False, False),
        (1, torch.float32, True, False),
    ],
)
def test_which_products_of_a_tape_it_does(
    rows: int, dtype: torch.dtype, is_transposed: bool, is_served: bool
) -> None:
    row, weight = torch.ones(1, rows, 12, dtype=dtype), torch.ones(12, 12, dtype=dtype)
    writer = TapeWriter()
    with torch.inference_mode(), writer:
        functional.linear(row, weight.T if is_transposed else weight)
    (call,) = writer.tape.calls
    assert (TritonKernels().call(call) is multiply_row) == is_served


def test_no_other_call_is_replaced() -> None:
    writer = TapeWriter()
    with torch.inference_mode(), writer:
        torch.ones(1, 4) * 2
    assert [TritonKernels().call(call) for call in writer.tape.calls] == [None, None]
