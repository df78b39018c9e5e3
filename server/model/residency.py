"""How deep adapters are in their slots, what that takes, and who gives room to another.

Knows layers and bytes; `adapters` moves the tensors.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from server.model.checkpoint import LoraCheckpoint


@dataclass(slots=True)
class Resident:
    """One adapter in a slot."""

    slot: int
    checkpoint: LoraCheckpoint
    num_layers: int
    """Of the model."""
    depth: int = 0
    """Layers below it are in the slot."""
    keep_depth: int = 0
    """What is worth keeping when nobody needs more."""
    num_bytes: int = 0
    users: Counter[int] = field(default_factory=Counter)
    """Sequences by the depth that each needs."""

    @property
    def needed_depth(self) -> int:
        """Of its deepest user; 0 without one."""
        return max(self.users, default=0)

    def modules(self, low: int, high: int) -> list[str]:
        """See `modules_between`."""
        return modules_between(self.checkpoint, low, high, self.num_layers)


def modules_between(checkpoint: LoraCheckpoint, low: int, high: int, num_layers: int) -> list[str]:
    """Modules that a depth of `high` applies and one of `low` does not.

    The embedding goes with the first layer, and `lm_head` with the last.
    """
    return [
        name
        for name, layer_idx in checkpoint.layers.items()
        if low <= min(max(layer_idx, 0), num_layers - 1) < high
    ]


def slot_bytes(checkpoint: LoraCheckpoint, names: Collection[str], dtype: torch.dtype) -> int:
    """What these modules of an adapter take in a slot."""
    modules = (checkpoint.modules[name] for name in names)
    tensors = (t for m in modules for t in (m.lora_A, m.lora_B, m.bias, m.gain) if t is not None)
    return sum(tensor.numel() for tensor in tensors) * dtype.itemsize


def depths_left(
    residents: Mapping[int, Resident], missing: int, dtype: torch.dtype, *, is_needed: bool
) -> dict[int, int] | None:
    """The depths to cut residents down to, by uid, so that `missing` bytes come free; None: they cannot.

    residents: least recently used first. is_needed: whether somebody waits for the room; what is only
    worth keeping displaces no layer that is kept for somebody who runs.
    """
    left: dict[int, int] = {}
    for uid, depth in _givers(residents, is_needed=is_needed):
        if missing <= 0:
            break
        resident = residents[uid]
        held = left.get(uid, resident.depth)
        if depth < held:
            missing -= slot_bytes(resident.checkpoint, resident.modules(depth, held), dtype)
            left[uid] = depth
    return left if missing <= 0 else None


def _givers(residents: Mapping[int, Resident], *, is_needed: bool) -> Iterator[tuple[int, int]]:
    """Who can do with less, cheapest to miss first, and the depth that is left to each.

    Layers above what is kept and needed, then adapters that nobody uses, then layers that are kept
    and not needed.
    """
    for uid, one in residents.items():
        yield uid, max(one.needed_depth, one.keep_depth)
    for uid, one in residents.items():
        if not one.users:
            yield uid, 0
    for uid, one in residents.items():
        if is_needed:
            yield uid, one.needed_depth
