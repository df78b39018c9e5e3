"""LoRA by the compiled kernel: every segment of a step and every module that reads one tensor in one call.

The fast twin of `server.model.lora.apply_grouped`. The kernel reads each adapter's own tensors, so an
adapter in a slot is held once, and no adapter's arrival moves another's weights.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from server.errors import ModelError
from server.model.native.library import Library
from server.model.native.structures import DTYPES, LoraCall, LoraLayer, LoraPart, LoraWeightsEntry
from server.model.replay.bound import Bound
from server.model.replay.tape import NotReplayable, Value
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
        self._library = library
        first = next(iter(parts[0].weights.values())).lora_A
        self._dtype = first.dtype
        self._num_slots = 1 + max(slot for part in parts for slot in part.weights)
        self._owned: list[object] = []
        self.num_parts = len(parts)
        self._columns = [part.column for part in parts]
        self._widths = [next(iter(part.weights.values())).lora_B.shape[0] for part in parts]
        ranks = [max(lora.lora_A.shape[0] for lora in part.weights.values()) for part in parts]
        self.low_stride = sum(ranks)
        """Floats of scratch that a row takes."""
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
        self._in_features = first.shape[1]
        self._call = LoraCall()
        self.describe(self._call)

    def describe(self, call: LoraCall) -> None:
        """Make it a call for all parts, but for its rows and where they lie."""
        call.parts, call.num_parts = ctypes.addressof(self._parts), self.num_parts
        call.num_slots = self._num_slots
        call.in_features, call.low_stride = self._in_features, self.low_stride
        call.dtype = DTYPES[self._dtype]

    def apply(
        self, output: Tensor, x: Tensor, rows: ReachedRows, scratch: "Scratch",
        first: int = 0, end: int = 1,
    ) -> None:  # fmt: skip
        """Add each segment's delta in place, to `output` and to the outputs beside it.

        output `[num_rows, out_features]`: part `first`'s own columns of the product whose columns the parts
        up to `end` have. x `[num_rows, in_features]`. Rows of both are contiguous and of the weights'
        dtype. Raises ModelError for anything else: the kernel trusts what it is given.
        """
        width, in_features = self._widths[first], self._in_features
        num_rows = rows[-1].end if rows else 0
        if (
            x.dtype is not self._dtype
            or output.dtype is not self._dtype
            or x.shape[1] != in_features
            or output.shape[1] != width
            or x.shape[0] < num_rows
            or output.shape[0] < num_rows
            or x.stride(1) != 1
            or output.stride(1) != 1
        ):
            raise ModelError(
                f"LoRA of {tuple(x.shape)} {x.dtype} to {tuple(output.shape)} {output.dtype} is not "
                f"what its weights are for: {in_features} to {width} {self._dtype}"
            )
        call = self._call
        call.y = output.data_ptr() - self._columns[first] * self._dtype.itemsize
        call.y_stride = output.stride(0)
        call.x, call.x_stride = x.data_ptr(), x.stride(0)
        call.parts = ctypes.addressof(self._parts) + first * _PART_SIZE
        call.num_parts = end - first
        call.segments, call.num_segments = rows.location
        call.low = scratch.address(x.shape[0] * self.low_stride)
        scratch.num_calls += 1
        self._library.run("fathom_lora", call, scratch.num_threads)

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


class BoundLora(Bound):
    """LoRA behind one product of a pass, by whichever adapters there are for it when it runs."""

    def __init__(self, x: Value, y: Value) -> None:
        """The product's input and output. Raises NotReplayable where their rows do not lie evenly."""
        if x.row_stride is None or y.row_stride is None:
            raise NotReplayable("the rows of a product do not lie evenly")
        self._layer = LoraLayer()
        self._lora = self._layer.lora
        self._lora.x_stride, self._lora.y_stride = x.row_stride, y.row_stride
        self.num_rows = prod(y.size[:-1])
        self.is_behind = False
        """Whether it only has those rows of its layer that are wanted in the end."""
        fields = ((self._lora, "x"), (self._lora, "y"))
        super().__init__("fathom_lora_layer", self._layer, (x, y), fields, ())

    def use(self, native: NativeLora | None, layer: int) -> int:
        """From now on apply what this holds, to the rows of the pass that reach the layer; None is nothing.

        native: of the modules that read x, whose columns y has; it must outlive every run until the next
        use. layer: the index in `reached` of the pass. Returns the floats of scratch that a row takes.
        """
        if native is None:
            self._lora.num_parts = 0
            return 0
        native.describe(self._lora)
        self._layer.layer = layer
        return native.low_stride


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
