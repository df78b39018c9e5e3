"""LoRA by the compiled kernel: every segment of a step and every module that reads one tensor in one call.

The fast twin of `server.model.lora.apply_grouped`. The kernel reads each adapter's own tensors, so an
adapter in a slot is held once, and no adapter's arrival moves another's weights.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import Tensor

from server.errors import ModelError
from server.model.native.library import DTYPES, Library, LoraCall, LoraPart, LoraWeightsEntry
from server.model.segments import ReachedRows

if TYPE_CHECKING:
    from server.model.lora import LoraWeights


@dataclass(frozen=True, slots=True)
class Part:
    """One module: its adapters by slot, and where its output lies."""

    weights: Mapping[int, "LoraWeights"]
    """Of at least one slot, all of one dtype. They must outlive whoever is made of this."""
    base_bias: Tensor | None
    column: int = 0
    """Its first of the product that it shares."""


_PART_SIZE = ctypes.sizeof(LoraPart)


class NativeLora:
    """The modules that read one tensor, in the order of their columns."""

    def __init__(self, library: Library, parts: Sequence[Part]) -> None:
        """parts: of one dtype and width of input."""
        self._call_kernel = library.functions.fathom_lora
        first = next(iter(parts[0].weights.values())).lora_A
        self._dtype = first.dtype
        self._num_slots = 1 + max(slot for part in parts for slot in part.weights)
        self._owned: list[object] = []
        self.num_parts = len(parts)
        self._columns = [part.column for part in parts]
        self._widths = [next(iter(part.weights.values())).lora_B.shape[0] for part in parts]
        ranks = [max(lora.lora_A.shape[0] for lora in part.weights.values()) for part in parts]
        self._low_stride = sum(ranks)
        low_columns = [0, *accumulate(ranks)][:-1]
        self._parts = (LoraPart * len(parts))(
            *(
                LoraPart(
                    weights=self._table(part.weights),
                    base_bias=self._address(part.base_bias),
                    column=part.column,
                    out_features=width,
                    low_column=low_column,
                )
                for part, width, low_column in zip(parts, self._widths, low_columns, strict=True)
            )
        )
        self._call, self._product_call = self._empty_call(first), self._empty_call(first)
        self._product_call.num_parts = self.num_parts
        self._seen: tuple[Tensor, Tensor] | None = None
        """What `_product_call` is for."""
        self._first_part = self._product_call.parts = ctypes.addressof(self._parts)

    def apply(
        self, output: Tensor, x: Tensor, rows: ReachedRows, scratch: "Scratch",
        first: int = 0, end: int = 1,
    ) -> None:  # fmt: skip
        """Add each segment's delta in place, to `output` and to the outputs beside it.

        output `[num_rows, out_features]`: part `first`'s own columns of the product whose columns the parts
        up to `end` have. x `[num_rows, in_features]`. Rows of both are contiguous and of the weights'
        dtype. Raises ModelError for anything else: the kernel trusts what it is given.
        """
        width = self._widths[first]
        self._check(output, width, output.shape[1] == width, x, rows)
        call = self._call
        call.y = output.data_ptr() - self._columns[first] * self._dtype.itemsize
        call.y_stride = output.stride(0)
        call.x, call.x_stride = x.data_ptr(), x.stride(0)
        call.parts = self._first_part + first * _PART_SIZE
        call.num_parts = end - first
        self._run(call, x.shape[0], rows, scratch)

    def apply_to_product(
        self, product: Tensor, x: Tensor, rows: ReachedRows, scratch: "Scratch"
    ) -> None:
        """The same to all parts, given the product `[num_rows, all their columns, or more]`.

        The same two tensors as in the last call are not looked at again: steps that are replayed give the
        same, and looking takes longer than the kernel does for few rows.
        """
        call, seen = self._product_call, self._seen
        is_known = seen is not None and seen[0] is product and seen[1] is x
        if not is_known or (rows and rows[-1].end > min(x.shape[0], product.shape[0])):
            width = self._columns[-1] + self._widths[-1]
            self._check(product, width, product.shape[1] >= width, x, rows)
            call.y, call.y_stride = product.data_ptr(), product.stride(0)
            call.x, call.x_stride = x.data_ptr(), x.stride(0)
            self._seen = product, x
        self._run(call, x.shape[0], rows, scratch)

    def _run(self, call: LoraCall, num_rows: int, rows: ReachedRows, scratch: "Scratch") -> None:
        within = rows if rows.largest_slot < self._num_slots else rows.below(self._num_slots)
        call.segments, call.num_segments = within.location
        call.low = scratch.address(num_rows * self._low_stride)
        call.num_threads = scratch.num_threads
        scratch.num_calls += 1
        self._call_kernel(call)

    def _check(
        self, output: Tensor, width: int, is_wide: bool, x: Tensor, rows: ReachedRows
    ) -> None:
        num_rows, in_features = rows[-1].end if rows else 0, self._call.in_features
        if (
            x.dtype is not self._dtype
            or output.dtype is not self._dtype
            or x.shape[1] != in_features
            or not is_wide
            or x.shape[0] < num_rows
            or output.shape[0] < num_rows
            or x.stride(1) != 1
            or output.stride(1) != 1
        ):
            raise ModelError(
                f"LoRA of {tuple(x.shape)} {x.dtype} to {tuple(output.shape)} {output.dtype} is not "
                f"what its weights are for: {in_features} to {width} {self._dtype}"
            )

    def _empty_call(self, lora_A: Tensor) -> LoraCall:
        return LoraCall(
            in_features=lora_A.shape[1], low_stride=self._low_stride, dtype=DTYPES[self._dtype]
        )

    def _table(self, weights: Mapping[int, "LoraWeights"]) -> int:
        table = (LoraWeightsEntry * self._num_slots)()
        for slot, lora in weights.items():
            table[slot] = LoraWeightsEntry(
                lora_A=self._address(lora.lora_A),
                lora_B=self._address(lora.lora_B.t()),
                bias=self._address(lora.bias),
                gain=self._address(lora.gain),
                rank=lora.lora_A.shape[0],
                scaling=lora.scaling,
            )
        self._owned.append(table)
        return ctypes.addressof(table)

    def _address(self, tensor: Tensor | None) -> int | None:
        """Where the kernel reads it; a copy where it does not lie row by row."""
        if tensor is None:
            return None
        held = tensor.contiguous()
        self._owned.append(held)
        return held.data_ptr()


class Scratch:
    """Memory for `A x`, shared by all modules of a model, and how many threads share the work."""

    def __init__(self) -> None:
        self.num_threads = 1
        self.num_calls = 0
        """Of the kernel, by all modules so far."""
        self._low = (ctypes.c_float * 0)()
        self._address = 0

    def address(self, num_floats: int) -> int:
        """Room for so many float32."""
        if len(self._low) < num_floats:
            self._low = (ctypes.c_float * num_floats)()
            self._address = ctypes.addressof(self._low)
        return self._address
