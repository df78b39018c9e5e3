"""Device slots: which adapters' weights are on the device, how deep, and in which slot.

The scheduler takes a slot for a sequence's adapter when it admits it and gives it back when it ends
or preempts it. A slot holds an adapter's layers below a depth, which is at least what its sequences
need; the layers above stay in host memory until somebody asks for them. A slot that nobody uses keeps
its weights until the place is needed, and gives up first what lies above the depth worth keeping; one of an
adapter that was unloaded or replaced is emptied when its last sequence has ended.
Runs on the engine thread; reading checkpoints is `checkpoint`'s work elsewhere.

Where the device is the host's own memory and the dtype the same, a slot holds the checkpoint's own tensors:
nothing is held twice. There a layer that is not in a slot is still in memory, and `max_bytes` bounds
what slots hold, not what the process does.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection

import structlog
import torch

from server.errors import AdapterError, ModelError
from server.model import faults
from server.model.checkpoint import LoraCheckpoint, LoraModule
from server.model.hooks import LoraHooks
from server.model.lora import LoraWeights
from server.model.residency import Resident, depths_left, modules_between, slot_bytes
from server.model.targets import Targets

log = structlog.get_logger(__name__)

BASE_SLOT = -1


class AdapterSlots:
    """At most `max_loras` adapters on the device, by the uid of their loaded content.

    max_bytes: of their weights together; None: as much as that many take.
    """

    def __init__(
        self,
        hooks: LoraHooks,
        targets: Targets,
        max_loras: int,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int | None = None,
    ) -> None:
        self._hooks = hooks
        self._targets = targets
        self._dtype = dtype
        self._device = device
        self._free = list(range(max_loras - 1, -1, -1))
        self._residents: OrderedDict[int, Resident] = OrderedDict()
        self._max_loras = max_loras
        self._max_bytes = max_bytes
        self.is_wanted: Callable[[int], bool] = lambda _: True
        """Whether somebody may still ask for the content with this uid; for whoever knows to say."""
        self._unwanted: set[int] = set()
        """Uids that nobody will ask for again; they leave when their users have."""
        self._lent: set[int] = set()
        self._depths: dict[int, int] = {}
        """Of the slots in use: what `check` holds steps against."""
        self.num_loads = 0
        """Adapters that came into a slot since the start."""
        self.num_evictions = 0
        """Those that left theirs for another."""

    @property
    def resident_uids(self) -> list[int]:
        """Adapters on the device, least recently used first."""
        return list(self._residents)

    @property
    def num_resident(self) -> int:
        """How many adapters there are on the device."""
        return len(self._residents)

    @property
    def resident_depths(self) -> dict[int, int]:
        """The depth to which each of them is there, by uid."""
        return {uid: resident.depth for uid, resident in self._residents.items()}

    @property
    def num_bytes(self) -> int:
        """Of the adapters on the device. What is lent is not among them."""
        return sum(resident.num_bytes for resident in self._residents.values())

    @property
    def num_users(self) -> int:
        """Sequences that hold a slot."""
        return sum(resident.users.total() for resident in self._residents.values())

    def acquire(
        self,
        uid: int,
        checkpoint: LoraCheckpoint,
        depth: int | None = None,
        keep_depth: int | None = None,
    ) -> int | None:
        """A slot holding this adapter below `depth`, or None while others' sequences hold the room.

        None as a depth is the whole adapter. If there is room, the layers up to `keep_depth` come too:
        that is where most requests for it end. Raises AdapterError for one that does not fit
        `max_bytes` alone, and what torch raises when the device has no memory, though everything that
        nobody uses has left it; then nobody's layers are fewer than they need.
        """
        full = self._targets.num_layers
        needed = full if depth is None else depth
        keep = max(needed, full if keep_depth is None else keep_depth)
        self._refuse_too_large(checkpoint, needed)
        resident = self._residents.get(uid) or self._new_resident(checkpoint)
        if resident is None:
            return None
        is_held = False
        try:
            is_held = self._hold(uid, resident, needed, keep)
        finally:  # the device may be out of memory
            if not is_held and uid not in self._residents:
                self._vacate(resident)
        if not is_held:
            return None
        self.num_loads += uid not in self._residents
        self._residents[uid] = resident
        self._residents.move_to_end(uid)
        resident.keep_depth = full if keep_depth is None else keep_depth
        resident.users[needed] += 1
        return resident.slot

    def release(self, uid: int, depth: int | None = None) -> None:
        """Give back one `acquire` of this depth."""
        users = self._residents[uid].users
        needed = self._targets.num_layers if depth is None else depth
        users[needed] -= 1
        if not users[needed]:
            del users[needed]
        if not users and not self.is_wanted(uid):  # it came after it was unloaded
            self._unwanted.add(uid)

    def look_for_unwanted(self) -> None:
        """Adapters were unloaded or replaced: those that are here leave when their users have."""
        self._unwanted = {uid for uid in self._residents if not self.is_wanted(uid)}

    def drop_unwanted(self) -> None:
        """Empty slots that nobody uses or will use. Called between steps."""
        for uid in [uid for uid in self._unwanted if not self._residents[uid].users]:
            self._drop(uid)

    def check(self, slot: int, depth: int) -> None:
        """Raise ModelError where a step would skip layers that are not in the slot.

        The hooks cannot tell them from layers that the adapter does not have. A slot that was never
        acquired is its owner's business.
        """
        held = self._depths.get(slot)
        if held is not None and depth > held:
            raise ModelError(f"slot {slot} holds its adapter below depth {held}, not {depth}")

    def lend(self, checkpoint: LoraCheckpoint) -> int:
        """A slot beside the `max_loras` that requests share, for work that is no request.

        It holds the whole adapter. Such work never waits for requests, nor they for it. Until `take_back`.
        """
        slot = self._max_loras
        while slot in self._lent:
            slot += 1
        self._hooks.load(slot, self._to_device(checkpoint, checkpoint.modules))
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
        for uid in list(self._residents):
            self._drop(uid)

    def _new_resident(self, checkpoint: LoraCheckpoint) -> Resident | None:
        """An empty slot for an adapter, if one is free or nobody uses what is in it."""
        if not self._free:
            uid = next((uid for uid, one in self._residents.items() if not one.users), None)
            if uid is None:
                return None
            self._drop(uid)
            self.num_evictions += 1
        slot = self._free.pop()
        self._depths[slot] = 0
        return Resident(slot, checkpoint, self._targets.num_layers)

    def _drop(self, uid: int) -> None:
        self._unwanted.discard(uid)
        self._vacate(self._residents.pop(uid))

    def _vacate(self, resident: Resident) -> None:
        self._leave(resident, 0)
        del self._depths[resident.slot]
        self._free.append(resident.slot)

    def _hold(self, uid: int, resident: Resident, needed: int, keep: int) -> bool:
        """Bring in what is needed and, if there is room, what is worth keeping.

        Where the device has no memory for that, once more for what is needed alone, after everything
        that nobody uses has left.
        """
        try:
            return self._deepen(uid, resident, keep, is_needed=keep == needed) or self._deepen(
                uid, resident, needed, is_needed=True
            )
        except Exception as error:
            if not faults.is_out_of_memory(error):
                raise
            log.warning("an adapter does not fit the device and is tried again", error=error)
        # Outside of `except`: the exception would keep alive what had come by then.
        self._make_way(uid, needed)
        return self._deepen(uid, resident, needed, is_needed=True)

    def _make_way(self, uid: int, needed: int) -> None:
        """Take off the device what nobody uses: other adapters, layers past a need, torch's own stock."""
        for other, resident in list(self._residents.items()):
            if resident.users or other == uid:
                wanted = needed if other == uid else 0
                self._leave(resident, max(resident.needed_depth, wanted))
            else:
                self._drop(other)
                self.num_evictions += 1
        faults.free_memory(self._device)

    def _deepen(self, uid: int, resident: Resident, depth: int, *, is_needed: bool) -> bool:
        """Bring in what lies below `depth` and is not there; whether there is room for it."""
        names = resident.modules(resident.depth, depth)
        num_bytes = slot_bytes(resident.checkpoint, names, self._dtype)
        if not self._make_room(num_bytes, uid, is_needed=is_needed):
            return False
        if names:
            try:
                self._hooks.load(resident.slot, self._to_device(resident.checkpoint, names))
            except BaseException:
                self._hooks.unload(resident.slot, names)
                raise
            resident.num_bytes += num_bytes
        resident.depth = max(resident.depth, depth)
        self._depths[resident.slot] = resident.depth
        return True

    def _make_room(self, num_bytes: int, uid: int, *, is_needed: bool) -> bool:
        """Let others' weights leave, if then so many more bytes fit; else nothing leaves."""
        if self._max_bytes is None:
            return True
        missing = self.num_bytes + num_bytes - self._max_bytes
        others = {key: one for key, one in self._residents.items() if key != uid}
        left = depths_left(others, missing, self._dtype, is_needed=is_needed)
        if left is None:
            return False
        for other, depth in left.items():
            resident = others[other]
            if depth == 0 and not resident.users:
                self._drop(other)
                self.num_evictions += 1
            else:
                self._leave(resident, depth)
        return True

    def _refuse_too_large(self, checkpoint: LoraCheckpoint, depth: int) -> None:
        if self._max_bytes is None:
            return
        names = modules_between(checkpoint, 0, depth, self._targets.num_layers)
        num_bytes = slot_bytes(checkpoint, names, self._dtype)
        if num_bytes > self._max_bytes:
            raise AdapterError(
                f"the adapter takes {num_bytes} bytes below depth {depth}; max_lora_bytes is"
                f" {self._max_bytes}"
            )

    def _leave(self, resident: Resident, depth: int) -> None:
        """Empty a slot down to a depth."""
        names = set(resident.modules(depth, resident.depth))
        if names:
            self._hooks.unload(resident.slot, names)
        resident.num_bytes -= slot_bytes(resident.checkpoint, names, self._dtype)
        resident.depth = min(resident.depth, depth)
        self._depths[resident.slot] = resident.depth

    def _to_device(
        self, checkpoint: LoraCheckpoint, names: Collection[str]
    ) -> dict[str, tuple[torch.nn.Module, int, LoraWeights]]:
        return {
            name: (
                self._targets[name].module,
                checkpoint.layers[name],
                self._weights(checkpoint.modules[name]),
            )
            for name in names
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
