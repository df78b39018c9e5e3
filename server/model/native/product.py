"""Products with packed weights by the compiled kernel: faster than oneDNN's own from one row to some hundred.

oneDNN does not say how it packs, so a weight's memory is read back and compared before the kernel is trusted
with it.
"""

import ctypes

import torch
from torch import Tensor

from server.model.native.library import Library, load
from server.model.native.rows_product import RowsProduct
from server.model.native.structures import ProductCall

_BLOCK = 64
"""Outputs that lie together."""
_LEVEL = "x86-64-v4"
"""Where oneDNN packs in such blocks, and the kernel has registers for them."""


class NativeProduct(RowsProduct):
    """`x W^T + bias` of one packed weight, which must outlive it; float32."""

    def __init__(
        self, library: Library, packed: Tensor, bias: Tensor | None, size: torch.Size
    ) -> None:
        """packed: as `is_understood` approved it; bias float32 `[out_features]`; size: of the weight."""
        super().__init__(library, "fathom_product", *size)
        self._bias = bias
        self._packed = _address(packed)
        self._block_stride = _block_size(packed, size)

    def _call(self, num_rows: int, dtype: torch.dtype) -> ProductCall:
        return ProductCall(
            y_stride=self.num_outputs,
            packed=self._packed,
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_rows=num_rows,
            in_features=self.num_inputs,
            out_features=self.num_outputs,
            block_stride=self._block_stride,
        )


def native_product(packed: Tensor, bias: Tensor | None, weight: Tensor) -> NativeProduct | None:
    """For a weight `[out_features, in_features]` that was packed; None where the kernel cannot read it."""
    library = load()
    if isinstance(library, str) or library.level != _LEVEL:
        return None
    if weight.dtype is not torch.float32 or not is_understood(packed, weight):
        return None
    return NativeProduct(library, packed, bias, weight.shape)


def is_understood(packed: Tensor, weight: Tensor) -> bool:
    """Whether the first, middle and last block of a packed float32 weight lie as the kernel reads them."""
    if not hasattr(torch.ops.mkldnn, "data_ptr") or not hasattr(torch.ops.mkldnn, "_nbytes"):
        return False
    num_outputs, num_inputs = weight.shape
    size = _block_size(packed, weight.shape)
    if size < _BLOCK * num_inputs or size % _BLOCK:
        return False
    num_blocks = -(-num_outputs // _BLOCK)
    for block in {0, num_blocks // 2, num_blocks - 1}:
        memory = (ctypes.c_float * size).from_address(_address(packed) + 4 * block * size)
        lying = torch.frombuffer(memory, dtype=torch.float32).view(-1, _BLOCK)[:num_inputs]
        rows = weight[block * _BLOCK : (block + 1) * _BLOCK]
        if not torch.equal(lying[:, : len(rows)].t(), rows):
            return False
    return True


def _block_size(packed: Tensor, size: torch.Size) -> int:
    """In floats, if it is packed as blocks of outputs."""
    return int(torch.ops.mkldnn._nbytes(packed)) // 4 // -(-size[0] // _BLOCK)


def _address(packed: Tensor) -> int:
    return int(torch.ops.mkldnn.data_ptr(packed))
