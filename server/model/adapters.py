"""Device slots: which adapters' weights are on the device, and in which slot.

The scheduler takes a slot for a sequence's adapter when it admits it and gives it back when it ends
or preempts it. A slot that nobody uses keeps its weights until another adapter needs the place, least
recently used first. Runs on the engine thread; reading checkpoints is `checkpoint`'s work elsewhere.

Where the device is the host's own memory and the dtype the same, a slot holds the checkpoint's own
tensors: nothing is held twice.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from server.model.checkpoint import LoraCheckpoint, LoraModule
from server.model.lora import LoraHooks, LoraWeights
from server.model.targets import Targets

BASE_SLOT = -1


@dataclass(slots=True)
class _Resident:
    slot: int
    num_users: int = 0


class AdapterSlots:
    """At most `max_loras` adapters on the device, by the uid of their loaded content."""

    def __init__(
        self,
        hooks: LoraHooks,
        targets: Targets,
        max_loras: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._hooks = hooks
        self._targets = targets
        self._dtype = dtype
        self._device = device
        self._free = list(range(max_loras - 1, -1, -1))
        self._residents: OrderedDict[int, _Resident] = OrderedDict()
        self._max_loras = max_loras
        self._lent: set[int] = set()

    @property
    def resident_uids(self) -> list[int]:
        """Adapters on the device, least recently used first."""
        return list(self._residents)

    @property
    def num_users(self) -> int:
        """Sequences that hold a slot."""
        return sum(resident.num_users for resident in self._residents.values())

    def acquire(self, uid: int, checkpoint: LoraCheckpoint) -> int | None:
        """A slot holding this adapter, or None while every slot is used by other adapters' sequences.

        Raises what torch raises when the device has no memory for it; then the slot is free.
        """
        resident = self._residents.get(uid)
        if resident is None:
            slot = self._take_slot()
            if slot is None:
                return None
            try:
                self._hooks.load(slot, self._to_device(checkpoint))
            except BaseException:  # the device may be out of memory
                self._hooks.unload(slot)
                self._free.append(slot)
                raise
            resident = self._residents[uid] = _Resident(slot)
        self._residents.move_to_end(uid)
        resident.num_users += 1
        return resident.slot

    def release(self, uid: int) -> None:
        """Give back one `acquire`."""
        self._residents[uid].num_users -= 1

    def lend(self, checkpoint: LoraCheckpoint) -> int:
        """A slot beside the `max_loras` that requests share, for work that is no request.

        Such work never waits for requests, nor they for it. Until `take_back`.
        """
        slot = self._max_loras
        while slot in self._lent:
            slot += 1
        self._hooks.load(slot, self._to_device(checkpoint))
        self._lent.add(slot)
        return slot

    def take_back(self, slot: int) -> None:
        """End a `lend`."""
        self._lent.remove(slot)
        self._hooks.unload(slot)

    def clear(self) -> None:
        """Empty every slot; hooks go with them."""
        for slot in list(self._lent):
            self.take_back(slot)
        for resident in self._residents.values():
            self._hooks.unload(resident.slot)
            self._free.append(resident.slot)
        self._residents.clear()

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        for uid, resident in self._residents.items():
            if resident.num_users == 0:
                del self._residents[uid]
                self._hooks.unload(resident.slot)
                return resident.slot
        return None

    def _to_device(
        self, checkpoint: LoraCheckpoint
    ) -> dict[str, tuple[torch.nn.Module, int, LoraWeights]]:
        return {
            name: (
                self._targets[name].module,
                checkpoint.layers[name],
                self._weights(module),
            )
            for name, module in checkpoint.modules.items()
        }

    def _weights(self, module: LoraModule) -> LoraWeights:
        def put(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(self._device, self._dtype)

        return LoraWeights(
            lora_A=module.lora_A.to(self._device, self._dtype),
            lora_B=module.lora_B.to(self._device, self._dtype),
            scaling=module.scaling,
            bias=put(module.bias),
            gain=put(module.gain),
        )
