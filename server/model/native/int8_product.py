"""Products with int8 weights by the compiled kernel: a quarter of float32's bytes are read, once.

`int8_product.c` is the only reader of what is packed here, so it serves on every processor that it is
compiled for.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.model.native.library import Library, load
from server.model.native.rows_product import RowsProduct
from server.model.native.structures import DTYPES, PRODUCT_BLOCK, Int8ProductCall

_BYTES = 4
"""Outputs that lie together, a vector's lanes apart."""


class NativeInt8Product(RowsProduct):
    """`(x Q^T) * scales + bias` of one weight, in float32 or bfloat16."""

    def __init__(
        self, library: Library, quantized: Tensor, scales: Tensor, bias: Tensor | None
    ) -> None:
        """quantized int8 `[out_features, in_features]`, which is copied; scales float32 `[out_features]`;
        bias `[out_features]`, of any dtype.
        """
        super().__init__(library, "fathom_int8_product", *quantized.shape)
        self._packed = _pack(quantized, library.int8_lanes)
        self._scales = scales.float().contiguous()
        self._bias = None if bias is None else bias.float().contiguous()

    @property
    def quantized(self) -> Tensor:
        """int8 `[out_features, in_features]`, unpacked on demand."""
        rows = self._packed.permute(0, 2, 4, 3, 1).reshape(-1, self.num_inputs)
        return rows[: self.num_outputs]

    def _call(self, num_rows: int, dtype: torch.dtype) -> Int8ProductCall:
        return Int8ProductCall(
            y_stride=self.num_outputs,
            packed=self._packed.data_ptr(),
            scales=self._scales.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_rows=num_rows,
            in_features=self.num_inputs,
            out_features=self.num_outputs,
            dtype=DTYPES[dtype],
            x_dtype=DTYPES[dtype],
        )


def native_int8_product(
    quantized: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> NativeInt8Product | None:
    """For activations of this dtype; None where no kernel multiplies them."""
    library = load()
    if isinstance(library, str) or quantized.device.type != "cpu" or dtype not in DTYPES:
        return None
    return NativeInt8Product(library, quantized, scales, bias)


def _pack(quantized: Tensor, lanes: int) -> Tensor:
    """`[blocks, in_features, groups of 4 * lanes, lanes, 4]`, the last block filled with zeros."""
    num_outputs, num_inputs = quantized.shape
    whole = pad(quantized, (0, 0, 0, -num_outputs % PRODUCT_BLOCK))
    apart = whole.view(-1, PRODUCT_BLOCK // (_BYTES * lanes), _BYTES, lanes, num_inputs)
    return apart.permute(0, 4, 1, 3, 2).contiguous()
