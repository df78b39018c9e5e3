"""Triton's kernels for what a lowered step launches. Importing this needs triton."""

from collections.abc import Callable, Collection
from math import prod
from typing import Any

import torch

from server.model.replay.chain import Chain
from server.model.replay.lowered import RunChain
from server.model.replay.tape import Call, Value
from server.model.replay.triton_chain import TritonChain
from server.model.triton_product import multiply_row

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonKernels:
    """`lowered.Kernels`."""

    def chain(self, chain: Chain, on_host: Collection[int]) -> RunChain:
        """See `lowered.Kernels.chain`."""
        return TritonChain(chain, on_host).run

    def call(self, call: Call) -> Callable[..., Any] | None:
        """See `lowered.Kernels.call`."""
        return multiply_row if _multiplies_one_row(call) else None


def _multiplies_one_row(call: Call) -> bool:
    if getattr(call.function, "overloadpacket", None) is not torch.ops.aten.linear or call.kwargs:
        return False
    row, weight, *biases = call.args
    values = [row, weight, *(bias for bias in biases if bias is not None)]
    if not all(isinstance(value, Value) for value in values):
        return False
    return (
        prod(row.size[:-1]) == 1
        and row.stride[-1] == 1
        and weight.stride == (weight.size[1], 1)
        and row.dtype in _DTYPES
        and all(value.dtype == row.dtype for value in values)
    )
