"""Products with int8 weights by the compiled kernel: a quarter of float32's bytes are read, once.

`int8_product.c` is the only reader of what is packed here, so it serves on every processor that it is
compiled for.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.model.native.library import DTYPES, INT8_BLOCK, Int8ProductCall, Library, load

_BYTES = 4
"""Outputs that lie together, a vector's lanes apart."""


class NativeInt8Product:
    """`(x Q^T) * scales + bias` of one weight."""

    def __init__(
        self, library: Library, quantized: Tensor, scales: Tensor, bias: Tensor | None
    ) -> None:
        """quantized int8 `[out_features, in_features]`, which is copied; scales float32 `[out_features]`;
        bias `[out_features]`, of any dtype.
        """
        self.num_outputs, self.num_inputs = quantized.shape
        self._kernel = library.functions.fathom_int8_product
        self._packed = _pack(quantized, library.int8_lanes)
        self._scales = scales.float().contiguous()
        self._bias = None if bias is None else bias.float().contiguous()

    @property
    def quantized(self) -> Tensor:
        """int8 `[out_features, in_features]`, unpacked on demand."""
        rows = self._packed.permute(0, 2, 4, 3, 1).reshape(-1, self.num_inputs)
        return rows[: self.num_outputs]

    def __call__(self, input: Tensor) -> Tensor:
        """input float32 or bfloat16 `[..., in_features]` -> `[..., out_features]` of its dtype."""
        output = input.new_empty(*input.shape[:-1], self.num_outputs)
        self.bound(output)(input)
        return output

    def bound(self, output: Tensor) -> Callable[[Tensor], None]:
        """What multiplies into `output`, contiguous, as many rows of its dtype as that has."""
        call = Int8ProductCall(
            y=output.data_ptr(),
            y_stride=self.num_outputs,
            packed=self._packed.data_ptr(),
            scales=self._scales.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_rows=output.numel() // self.num_outputs,
            in_features=self.num_inputs,
            out_features=self.num_outputs,
            dtype=DTYPES[output.dtype],
            num_threads=torch.get_num_threads(),
        )
        kernel, reference, num_inputs = self._kernel, ctypes.addressof(call), self.num_inputs

        def multiply(input: Tensor) -> None:
            assert input.dtype is output.dtype
            x = input.reshape(-1, num_inputs)
            if x.stride(1) != 1:
                x = x.contiguous()
            call.x, call.x_stride = x.data_ptr(), x.stride(0)
            kernel(reference)

        return multiply


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
    whole = pad(quantized, (0, 0, 0, -num_outputs % INT8_BLOCK))
    apart = whole.view(-1, INT8_BLOCK // (_BYTES * lanes), _BYTES, lanes, num_inputs)
    return apart.permute(0, 4, 1, 3, 2).contiguous()
