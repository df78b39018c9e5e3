"""LoRA of many long segments in two grouped products a module, for prompts on a CUDA device.

`lora.apply_grouped` takes two products an adapter and module; here all adapters whose weights lie in
the gathered stacks share them. Rows are taken in the order of their slots, so that every slot of the
stack is a group, an empty one where no row has it, and no weight is copied.

torch's kernel for it needs bfloat16 and compute capability 9.0; elsewhere torch falls back to a loop
that reads the groups' sizes on the host, which waits for the device once a product, so `is_available`
says no. It takes rows whose size is a multiple of 16 bytes, and a module whose rows are not is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from server.model.gathered import GatheredSlots
from server.model.gathered_kernel import UpProjections
from server.model.segments import Segment
from server.model.stacks import StackedModule

if TYPE_CHECKING:
    from server.model.lora import LoraWeights

_ALIGNMENT = 16
"""Bytes."""


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups here without waiting for the device."""
    return (
        hasattr(functional, "grouped_mm")
        and device.type == "cuda"
        and dtype is torch.bfloat16
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@dataclass(frozen=True, slots=True)
class Grouping:
    """Some segments' rows by slot.

    rows: int64 `[num_own]`, rows of the step in the order of their slots. slots: int64 `[num_own]`.
    ends: int32 `[num_slots]`, how many of the rows have this slot or a lower one.
    """

    rows: Tensor
    slots: Tensor
    ends: Tensor

    @classmethod
    def build(cls, segments: Sequence[Segment], num_slots: int, device: torch.device) -> "Grouping":
        """segments: of slots below `num_slots`, not empty."""
        rows: list[int] = []
        slots: list[int] = []
        counts = [0] * num_slots
        for segment in sorted(segments, key=lambda segment: segment.slot):
            own = range(segment.start, segment.end)
            rows.extend(own)
            slots.extend([segment.slot] * len(own))
            counts[segment.slot] += len(own)
        return cls(
            rows=torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
            slots=torch.tensor(slots, dtype=torch.int64).to(device, non_blocking=True),
            ends=torch.tensor(counts).cumsum(0).to(device, torch.int32, non_blocking=True),
        )


class GroupedProducts:
    """Takes what it can of a module's segments, and says what it left."""

    def __init__(self, slots: GatheredSlots, device: torch.device) -> None:
        self._slots = slots
        self._device = device
        # Layers share the list of their segments, and modules mostly agree on what is special.
        self._last: tuple[Sequence[Segment], frozenset[int], Grouping] | None = None

    def apply(
        self,
        output: Tensor,
        x: Tensor,
        segments: Sequence[Segment],
        name: str,
        special: frozenset[int],
    ) -> Sequence[Segment]:
        """Add plain LoRA's `scaling * B (A x)` to the rows of `segments`, in place.

        output `[num_rows, out_features]`, x `[num_rows, in_features]`: of the whole step. special:
        slots that are more than that in this module. Returns the segments that are still to do: those
        of special slots, or all where a module does not suit the kernel or where there is but one.
        """
        stacked = self._slots.find(name)
        if len(segments) < 2 or stacked is None or stacked.up is None or not _is_aligned(stacked):
            return segments
        left = [segment for segment in segments if segment.slot in special]
        if len(left) < len(segments):
            grouping = self._grouping(segments, special)
            apply_grouped_mm(
                output, x, grouping, stacked.group.down.lora_A[stacked.index], stacked.up
            )
        return left

    def special(self, weights: Mapping[int, "LoraWeights"]) -> frozenset[int]:
        """Slots that are not plain LoRA in a module's stack. weights: the module's, by slot."""
        return frozenset(
            slot
            for slot, lora in weights.items()
            if lora.bias is not None or lora.gain is not None or slot >= self._slots.num_slots
        )

    def _grouping(self, segments: Sequence[Segment], special: frozenset[int]) -> Grouping:
        if self._last is not None:
            known, known_special, grouping = self._last
            if known is segments and known_special == special:
                return grouping
        own = [segment for segment in segments if segment.slot not in special]
        grouping = Grouping.build(own, self._slots.num_slots, self._device)
        self._last = segments, special, grouping
        return grouping


def apply_grouped_mm(
    output: Tensor, x: Tensor, grouping: Grouping, lora_A: Tensor, up: UpProjections
) -> None:
    """Add `scaling * B (A x)` to the grouping's rows of `output`, in place.

    output `[num_rows, out_features]`, x `[num_rows, in_features]`: of the whole step. lora_A
    `[num_slots, rank, in_features]`, up: the module's alone. A slot that does not target the module holds
    zeros, and adds them.
    """
    own = x.index_select(0, grouping.rows)
    low_rank = functional.grouped_mm(own, lora_A.transpose(1, 2), offs=grouping.ends)
    low_rank = low_rank * up.scaling[0].index_select(0, grouping.slots).to(x.dtype).unsqueeze(1)
    delta = functional.grouped_mm(low_rank, up.lora_B.transpose(1, 2), offs=grouping.ends)
    output.index_add_(0, grouping.rows, delta)


def _is_aligned(stacked: StackedModule) -> bool:
    down = stacked.group.down.lora_A
    sizes = (down.shape[-1], down.shape[-2], stacked.target.out_features)
    return all(size * down.element_size() % _ALIGNMENT == 0 for size in sizes)
