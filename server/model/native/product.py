"""Products with packed weights by the compiled kernel: faster than oneDNN's own from one row to some hundred.

`product.c` is the only reader of what is packed here.
"""

import torch
from torch import Tensor

from server.model.native.library import Library, load
from server.model.native.rows_product import RowsProduct
from server.model.native.structures import DTYPES, PRODUCT_BLOCK, ProductCall

_MEASURED_LEVELS = ("x86-64-v3", "x86-64-v4")
"""Where the kernel was compared with oneDNN."""


class NativeProduct(RowsProduct):
    """`x W^T + bias` of one weight, in the weight's dtype: float32 or bfloat16."""

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None) -> None:
        """weight `[out_features, in_features]`, which is copied; bias `[out_features]`, of any dtype."""
        super().__init__(library, "fathom_product", *weight.shape)
        self._dtype = weight.dtype
        self._packed = _pack(weight, library.product_strip)
        self._bias = None if bias is None else bias.float().contiguous()

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`, unpacked on demand."""
        rows = self._packed.transpose(1, 2).reshape(-1, self.num_inputs)
        return rows[: self.num_outputs]

    def _call(self, num_rows: int, dtype: torch.dtype) -> ProductCall:
        if dtype is not self._dtype:
            raise TypeError(f"the input is {dtype}, the weight {self._dtype}")
        return ProductCall(
            y_stride=self.num_outputs,
            packed=self._packed.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_rows=num_rows,
            in_features=self.num_inputs,
            out_features=self.num_outputs,
            dtype=DTYPES[dtype],
            x_dtype=DTYPES[dtype],
        )


def native_product(weight: Tensor, bias: Tensor | None) -> NativeProduct | None:
    """For a weight `[out_features, in_features]`; None where no kernel multiplies it."""
    library = load()
    if isinstance(library, str) or not is_available(weight.dtype):
        return None
    return NativeProduct(library, weight, bias)


def is_available(dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies weights of this dtype here."""
    return not isinstance(load(), str) and dtype in DTYPES


def is_fastest(dtype: torch.dtype) -> bool:
    """Whether such weights are better off here than with oneDNN."""
    library = load()
    is_measured = not isinstance(library, str) and library.level in _MEASURED_LEVELS
    return is_measured and dtype is torch.float32


def _pack(weight: Tensor, strip: int) -> Tensor:
    """`[blocks and strips, in_features, strip]`, the last block filled with zeros; no other copy is made."""
    num_outputs, num_inputs = weight.shape
    num_strips = -(-num_outputs // PRODUCT_BLOCK) * (PRODUCT_BLOCK // strip)
    packed = weight.new_empty((num_strips, num_inputs, strip))
    num_whole, num_left = divmod(num_outputs, strip)
    whole = weight[: num_whole * strip].reshape(num_whole, strip, num_inputs)
    packed[:num_whole] = whole.transpose(1, 2)
    packed[num_whole:] = 0
    if num_left:
        packed[num_whole, :, :num_left] = weight[num_whole * strip :].t()
    return packed
