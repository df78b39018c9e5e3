"""Linears over int8 weights, on a CPU: the product that `packed` gives them.

    y = (x Q^T) * scales + bias

By the compiled kernel, which reads a quarter of float32's bytes, where there is one; else by torch's
operators as torchao writes them, which make floats of all weights each time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from server.model.native.int8_product import NativeInt8Product, native_int8_product
from server.model.products import NotedProduct
from server.model.quantization import Int8Weight, read


class Int8Product(NotedProduct):
    """For one Linear, or several that read the same input."""

    _native: NativeInt8Product | None

    def __init__(
        self, weight: Int8Weight, bias: Tensor | None, num_readers: int, dtype: torch.dtype
    ) -> None:
        """weight, bias `[out_features]`: of all readers together; dtype: of activations."""
        super().__init__(len(weight.values), bias, num_readers)
        self._dtype = dtype
        self._scales = weight.scales
        self._native = native_int8_product(weight.values, weight.scales, bias, dtype)
        self._values = None if self._native is not None else weight.values

    @property
    def values(self) -> Tensor:
        """int8 `[out_features, in_features]`"""
        if self._native is not None:
            return self._native.quantized
        assert self._values is not None
        return self._values

    def weight(self, first_column: int, num_columns: int) -> Tensor:
        """See `LinearProduct.weight`; dequantized on demand."""
        end = first_column + num_columns
        rows = Int8Weight(self.values[first_column:end], self._scales[first_column:end])
        return rows.dequantized(self._dtype)

    def __call__(self, input: Tensor) -> Tensor:
        """See `NotedProduct.__call__`."""
        if self._native is not None:
            return self._native(input)
        rows = input.reshape(-1, input.shape[-1])
        output = torch.mm(rows, self.values.t().to(input.dtype)) * self._scales.to(input.dtype)
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], self.out_features)


def joined_int8(group: Sequence[nn.Linear]) -> Int8Product:
    """One product of Linears that `quantization` quantized."""
    weights = [read(module) for module in group]
    biases = [module.bias.detach() for module in group if module.bias is not None]
    weight = weights[0]
    if len(weights) > 1:
        weight = Int8Weight(
            torch.cat([one.values for one in weights]), torch.cat([one.scales for one in weights])
        )
    bias = torch.cat(biases) if biases else None
    return Int8Product(weight, bias, len(group), group[0].weight.dtype)
