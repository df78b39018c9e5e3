"""LoRA of one module by the compiled kernel: every segment of a step in one call.

The fast twin of `server.model.lora.apply_grouped`. The kernel reads each adapter's own tensors, so an
adapter in a slot is held once, and no adapter's arrival moves another's weights.
"""

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from server.errors import ModelError
from server.model.native.library import DTYPES, Library, LoraCall, LoraWeightsEntry
from server.model.segments import ReachedRows

if TYPE_CHECKING:
    from server.model.lora import LoraWeights


class NativeLora:
    """One module's adapters, as the kernel finds them by slot."""

    def __init__(
        self, library: Library, weights: Mapping[int, "LoraWeights"], base_bias: Tensor | None
    ) -> None:
        """weights: by slot, all of one dtype and shaped for one module. They must outlive this object."""
        self._call_kernel = library.functions.fathom_lora
        first = next(iter(weights.values()))
        self._dtype = first.lora_A.dtype
        self._table = (LoraWeightsEntry * (max(weights) + 1))()
        self._num_slots = len(self._table)
        self._owned: list[Tensor] = []
        self._max_rank = max(lora.lora_A.shape[0] for lora in weights.values())
        for slot, lora in weights.items():
            self._table[slot] = LoraWeightsEntry(
                lora_A=self._address(lora.lora_A),
                lora_B=self._address(lora.lora_B.t()),
                bias=None if lora.bias is None else self._address(lora.bias),
                gain=None if lora.gain is None else self._address(lora.gain),
                rank=lora.lora_A.shape[0],
                scaling=lora.scaling,
            )
        self._call = LoraCall(
            base_bias=None if base_bias is None else self._address(base_bias),
            weights=ctypes.addressof(self._table),
            in_features=first.lora_A.shape[1],
            out_features=first.lora_B.shape[0],
            max_rank=self._max_rank,
            dtype=DTYPES[self._dtype],
        )
        self._reference = ctypes.byref(self._call)

    def apply(self, output: Tensor, x: Tensor, rows: ReachedRows, scratch: "Scratch") -> None:
        """Add each segment's delta to `output` in place.

        output `[num_rows, out_features]`, x `[num_rows, in_features]`, rows of both contiguous, of the
        weights' dtype. Raises ModelError for anything else: the kernel trusts what it is given.
        """
        call = self._call
        num_rows = rows[-1].end if rows else 0
        if (
            x.dtype is not self._dtype
            or output.dtype is not self._dtype
            or x.shape[1:] != (call.in_features,)
            or output.shape[1:] != (call.out_features,)
            or min(x.shape[0], output.shape[0]) < num_rows
            or x.stride(1) != 1
            or output.stride(1) != 1
        ):
            raise ModelError(
                f"LoRA of {tuple(x.shape)} {x.dtype} to {tuple(output.shape)} {output.dtype} is not "
                f"what its weights are for: {call.in_features} to {call.out_features} {self._dtype}"
            )
        within = rows if rows.largest_slot < self._num_slots else rows.below(self._num_slots)
        packed, length = within.packed.buffer_info()
        call.y, call.y_stride = output.data_ptr(), output.stride(0)
        call.x, call.x_stride = x.data_ptr(), x.stride(0)
        call.segments, call.num_segments = packed, length // 3
        call.low = scratch.address(num_rows * self._max_rank)
        call.num_threads = scratch.num_threads
        self._call_kernel(self._reference)

    def _address(self, tensor: Tensor) -> int:
        """Where the kernel reads it; a copy where it does not lie row by row."""
        held = tensor.contiguous()
        self._owned.append(held)
        return held.data_ptr()


class Scratch:
    """Memory for `A x`, shared by all modules of a model, and how many threads share the work."""

    def __init__(self) -> None:
        self.num_threads = 1
        self._low = (ctypes.c_float * 0)()

    def address(self, num_floats: int) -> int:
        """Room for so many float32."""
        if len(self._low) < num_floats:
            self._low = (ctypes.c_float * num_floats)()
        return ctypes.addressof(self._low)
