"""Operators that no chain has, as kernels' calls (`native/operators.c`): what a step begins and ends with.

Where they are not in the form that is known here, they stay torch's own.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from server.model.native.structures import DTYPES, GatherCall, MapCall, MapCode, ProductCall
from server.model.packed import is_multiplied_here
from server.model.replay.bound import Bound
from server.model.replay.tape import Call, Value

aten = torch.ops.aten


def bind_operator(call: Call) -> Bound | None:
    """One of torch's operators as a kernel's call; None where it stays torch's."""
    bind = _BINDS.get(call.function)
    if bind is None or call.kwargs or len(call.outputs) != 1 or call.outputs[0] is None:
        return None
    values = (*call.inputs, call.outputs[0])
    is_dense = all(value.size and value.row_stride == value.size[-1] for value in values)
    return bind(call, call.outputs[0]) if is_dense else None


def _embedding(call: Call, out: Value) -> Bound | None:
    table, indices = call.args[:2]
    if indices.dtype != torch.int64 or table.dtype != out.dtype:
        return None
    gather = GatherCall(
        num_rows=prod(indices.size), row_bytes=table.size[-1] * table.dtype.itemsize
    )
    fields = ((gather, "out"), (gather, "table"), (gather, "indices"))
    return Bound("fathom_gather", gather, (out, table, indices), fields, (out,))


def _linear(call: Call, out: Value) -> Bound | None:
    """Of a weight that was not packed, as others read it: an lm_head that is the embedding."""
    x, weight, *rest = call.args
    is_known = x.dtype is weight.dtype is out.dtype and rest in ([], [None])
    if not is_known or not is_multiplied_here(weight.dtype):
        return None
    out_features, in_features = weight.size
    product = ProductCall(
        y_stride=out_features,
        x_stride=in_features,
        num_rows=prod(x.size[:-1]),
        in_features=in_features,
        out_features=out_features,
        dtype=DTYPES[x.dtype],
        x_dtype=DTYPES[x.dtype],
    )
    fields = ((product, "y"), (product, "x"), (product, "packed"))
    return Bound("fathom_plain_product", product, (out, x, weight), fields, (out,))


def _map(code: MapCode, read: torch.dtype) -> Callable[[Call, Value], Bound | None]:
    def bind(call: Call, out: Value) -> Bound | None:
        given = call.args[0]
        if given.dtype != read or out.dtype != torch.float32:
            return None
        made = MapCall(length=prod(out.size), code=code)
        return Bound("fathom_map", made, (out, given), ((made, "out"), (made, "in_")), (out,))

    return bind


_BINDS: dict[Any, Callable[[Call, Value], Bound | None]] = {
    aten.embedding.default: _embedding,
    aten.linear.default: _linear,
    aten.to.dtype: _map(MapCode.FROM_INT64, torch.int64),
    aten.cos.default: _map(MapCode.COS, torch.float32),
    aten.sin.default: _map(MapCode.SIN, torch.float32),
}
