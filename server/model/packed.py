"""Linear weights in a blocked layout, which a CPU multiplies faster than rows.

`torch.nn.Linear` keeps its weight row by row, and a product with few rows (a decode step) then runs
far below what the processor can do: 16 rows by 768 x 2048 in float32 took 1051 us plain and 663 us
packed on one core of an AMD EPYC (Zen 4), 735 and 349 us on two. The packed copy replaces the
plain one, so memory stays what it was; the module keeps its identity, its name and its hooks.

Our own kernel multiplies (`native/product`) where it is the faster one, and where oneDNN does not at all, as
bfloat16 on processors that have no instructions for it. Else oneDNN does, which compiles kernels for each
shape of weight and each number of rows that it meets, and keeps them, half a megabyte a pair: 780 MB after
16 to 511 rows by three shapes (torch 2.13, AVX-512). So rows are padded to few different numbers.

oneDNN's operators are torch's own, the ones its inductor compiler emits for frozen weights; where a
build lacks them, and no kernel was compiled, the model stays as it is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from server.model.int8_product import joined_int8
from server.model.native import product as native
from server.model.native.product import NativeProduct
from server.model.packed_memory import page_out
from server.model.products import NotedProduct, ProductLinear, join, joined, num_owners
from server.model.quantization import is_int8

_NUM_ROWS_HINT = 16
"""oneDNN picks the layout for about this many rows; the hint mattered little from 1 to 512."""


class NativelyPacked(NotedProduct):
    """With weights packed for our own kernel."""

    _native: NativeProduct

    def __init__(self, native: NativeProduct, bias: Tensor | None, num_readers: int) -> None:
        super().__init__(native.num_outputs, bias, num_readers)
        self._native = native

    def weight(self, first_column: int, num_columns: int) -> Tensor:
        """See `LinearProduct.weight`; unpacked on demand."""
        return self._native.weight[first_column:][:num_columns]

    def __call__(self, input: Tensor) -> Tensor:
        """See `NotedProduct.__call__`."""
        return self._native(input)


class OneDnnPacked(NotedProduct):
    """With weights packed for oneDNN."""

    _native = None

    def __init__(self, weight: Tensor, bias: Tensor | None, num_readers: int) -> None:
        """weight `[out_features, in_features]` and bias `[out_features]`: of all readers together."""
        super().__init__(len(weight), bias, num_readers)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _NUM_ROWS_HINT)

    def weight(self, first_column: int, num_columns: int) -> Tensor:
        """See `LinearProduct.weight`; unpacked on demand."""
        return self._packed.to_dense()[first_column:][:num_columns]

    def __call__(self, input: Tensor) -> Tensor:
        """See `NotedProduct.__call__`."""
        num_rows = math.prod(input.shape[:-1])
        num_padding = padded(num_rows) - num_rows
        if not num_padding:
            return self._by_onednn(input)
        rows = pad(input.reshape(num_rows, -1), (0, 0, 0, num_padding))
        return self._by_onednn(rows)[:num_rows].view(*input.shape[:-1], -1)

    def _by_onednn(self, rows: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            rows, self._packed, self.bias, "none", [], ""
        )
        return output


class PackedLinear(ProductLinear):
    """An `nn.Linear` whose weight was packed in place by `pack`; made only there."""

    product: NotedProduct


def padded(num_rows: int) -> int:
    """How many rows are multiplied where there are `num_rows`: eight numbers an octave, all to 16.

    Less than an eighth more than there are, as from 16 rows on the time grows with the rows.
    """
    step = 1 << max(0, (num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this kind can be packed here."""
    return device.type == "cpu" and (has_onednn(dtype) or native.is_available(dtype))


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN, as this torch has it, multiplies packed weights of this dtype on this processor."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not (  # type: ignore[no-untyped-call]
        hasattr(operators, "_linear_pointwise") and hasattr(operators, "_reorder_linear_weight")
    ):
        return False
    if dtype is torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def is_multiplied_here(dtype: torch.dtype) -> bool:
    """Whether our own kernels multiply weights of this dtype faster than oneDNN, or it does not at all."""
    return native.is_fastest(dtype) or (native.is_available(dtype) and not has_onednn(dtype))


@torch.inference_mode()
def pack(model: nn.Module, siblings: Sequence[Sequence[nn.Linear]] = ()) -> int:
    """Pack every Linear whose weight is its own, plain or int8; returns how many.

    siblings: groups that may be packed as one, see `find_siblings`. A weight that another module shares
    (a tied `lm_head`) stays, since packing it would hold it twice.
    """
    owners = num_owners(model)
    groups = {id(module): group for group in siblings for module in group}
    num_packed = 0
    for module in model.modules():
        if type(module) is not nn.Linear or owners[id(module.weight)] > 1:
            continue
        group = [
            member
            for member in groups.get(id(module), [module])
            if owners[id(member.weight)] == 1 and is_int8(member) == is_int8(module)
        ]
        _pack_together(group)
        num_packed += len(group)
    return num_packed


def _pack_together(group: Sequence[nn.Linear]) -> None:
    if is_int8(group[0]):
        join(group, joined_int8(group), PackedLinear)
        return
    weights = [module.weight.detach() for module in group]
    weight, bias = joined(group)
    join(group, _packed(weight, bias, num_readers=len(group)), PackedLinear)
    for plain in weights:
        page_out(plain)


def _packed(weight: Tensor, bias: Tensor | None, num_readers: int) -> NotedProduct:
    """By whichever multiplies such weights faster."""
    made = native.native_product(weight, bias) if is_multiplied_here(weight.dtype) else None
    if made is not None:
        return NativelyPacked(made, bias, num_readers)
    return OneDnnPacked(weight, bias, num_readers)
