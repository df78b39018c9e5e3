"""The product of one row with a weight in Triton, for decode steps of one sequence on CUDA devices.

Such a product does nothing but read the weight once. The device's library reads the smaller weights of a
model at two thirds to four fifths of the bandwidth, partly since it splits them and sums in a second
launch; a program that reads few whole rows of a weight reaches 80 to 95 % (an H200, 8 to 235 MB a weight).
Sums are float32. Importing this needs triton.
"""

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4
_FEATURES = 2048
_WARPS, _STAGES = 8, 3


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    output, input, weight, bias, in_features, out_features,
    HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < out_features
    sums = tl.zeros((COLUMNS, FEATURES), tl.float32)
    for start in range(0, in_features, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        is_feature = feature < in_features
        factors = tl.load(
            weight + column[:, None].to(tl.int64) * in_features + feature[None, :],
            mask=is_column[:, None] & is_feature[None, :],
            other=0.0,
            eviction_policy="evict_first",  # nobody reads it again in this step
        )
        row = tl.load(input + feature, mask=is_feature, other=0.0)
        sums += factors.to(tl.float32) * row.to(tl.float32)[None, :]
    result = tl.sum(sums, 1)
    if HAS_BIAS:
        result += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(output + column, result.to(output.dtype.element_ty), mask=is_column)


def multiply_row(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of one row.

    input `[..., in_features]`, of one row in all; weight `[out_features, in_features]`, contiguous; bias
    `[out_features]`. All of one floating dtype, which the result has, too: `[..., out_features]`.
    """
    out_features, in_features = weight.shape
    output = input.new_empty((*input.shape[:-1], out_features))
    _multiply[(triton.cdiv(out_features, _COLUMNS),)](
        output, input, weight, weight if bias is None else bias, in_features, out_features,
        HAS_BIAS=bias is not None, COLUMNS=_COLUMNS,
        FEATURES=min(_FEATURES, int(triton.next_power_of_2(in_features))),
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return output
