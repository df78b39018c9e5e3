"""Device slots: who is on the device, who goes when another comes, and what stays behind: nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from server.model import faults
from server.model.adapters import AdapterSlots
from server.model.checkpoint import LoraCheckpoint, read_checkpoint
from server.model.hooks import LoraHooks
from server.model.lora import LoraWeights
from server.model.native.structures import LoraWeightsEntry
from tests.parity.zoo import NUM_LAYERS
from tests.tiny import Tiny, num_hooks

MAX_LORAS = 2


@pytest.fixture
def hooks(tiny: Tiny) -> Iterator[LoraHooks]:
    made = LoraHooks(NUM_LAYERS)
    yield made
    made.install(0)
    assert num_hooks(tiny.base.model) == 0


@pytest.fixture
def slots(tiny: Tiny, hooks: LoraHooks) -> AdapterSlots:
    return AdapterSlots(hooks, tiny.targets, MAX_LORAS, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny) -> LoraCheckpoint:
    return read_checkpoint(tiny.adapter("a"), tiny.targets)


def test_an_adapter_is_put_into_one_slot_for_all_who_use_it(
    slots: AdapterSlots, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    slot = slots.acquire(7, checkpoint)
    assert slot is not None
    before = hooks.weights(slot)
    assert slots.acquire(7, checkpoint) == slot
    assert hooks.weights(slot) == before  # not loaded again
    assert (slots.num_users, slots.resident_uids) == (2, [7])
    assert before.keys() == checkpoint.modules.keys()
    for name, weights in before.items():
        module = checkpoint.modules[name]
        assert torch.equal(weights.lora_A, module.lora_A)
        assert torch.equal(weights.lora_B, module.lora_B)
        assert weights.scaling == module.scaling


def test_weights_take_the_models_dtype(tiny: Tiny, hooks: LoraHooks) -> None:
    slots = AdapterSlots(hooks, tiny.targets, 1, torch.bfloat16, torch.device("cpu"))
    slot = slots.acquire(1, read_checkpoint(tiny.adapter("c"), tiny.targets))
    assert slot is not None
    for weights in hooks.weights(slot).values():
        assert weights.gain is not None
        assert {weights.lora_A.dtype, weights.lora_B.dtype, weights.gain.dtype} == {torch.bfloat16}


def test_an_adapter_in_use_keeps_its_slot_and_an_idle_one_gives_way(
    slots: AdapterSlots, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    first, second = slots.acquire(1, checkpoint), slots.acquire(2, checkpoint)
    assert first != second
    assert slots.acquire(3, checkpoint) is None
    slots.release(1)
    assert slots.resident_uids == [1, 2]  # idle, and still there
    assert slots.acquire(1, checkpoint) == first
    slots.release(1)
    assert slots.acquire(3, checkpoint) == first
    assert slots.resident_uids == [2, 3]
    assert first is not None
    assert hooks.weights(first).keys() == checkpoint.modules.keys()


def test_the_least_recently_used_goes_first(
    slots: AdapterSlots, checkpoint: LoraCheckpoint
) -> None:
    for uid in (1, 2, 1):
        slots.acquire(uid, checkpoint)
        slots.release(uid)
    slots.acquire(3, checkpoint)
    assert slots.resident_uids == [1, 3]


def test_of_the_adapter_that_left_no_weight_stays(
    tiny: Tiny, slots: AdapterSlots, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    """Else the modules that only the former one targets would go on with its weights."""
    few = read_checkpoint(tiny.adapter("shallow"), tiny.targets)
    assert few.modules.keys() < checkpoint.modules.keys()
    for uid in (1, 2):
        slots.acquire(uid, checkpoint)
        slots.release(uid)
    slot = slots.acquire(3, few)
    assert slot is not None
    assert hooks.weights(slot).keys() == few.modules.keys()


def test_a_load_that_fails_leaves_the_slot_free(
    slots: AdapterSlots,
    hooks: LoraHooks,
    checkpoint: LoraCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to_device = slots._weights
    is_full = True

    def weights(module: Any) -> LoraWeights:
        if is_full:
            raise torch.OutOfMemoryError("no memory")
        return to_device(module)

    monkeypatch.setattr(slots, "_weights", weights)
    for _ in range(MAX_LORAS + 1):
        with pytest.raises(torch.OutOfMemoryError):
            slots.acquire(1, checkpoint)
    assert (slots.resident_uids, slots.num_users) == ([], 0)
    is_full = False
    assert {slots.acquire(uid, checkpoint) for uid in (1, 2)} == {0, 1}


class Device:
    """Room for the modules of so many whole adapters, and what torch keeps until it is told not to."""

    def __init__(self, slots: AdapterSlots, hooks: LoraHooks, num_modules: int) -> None:
        self._to_device = slots._weights
        self._hooks = hooks
        self.num_modules = num_modules
        self.num_kept = 0
        self.num_arriving = 0
        self.num_freed = 0

    def put(self, module: Any) -> LoraWeights:
        num_held = sum(len(self._hooks.weights(slot)) for slot in range(MAX_LORAS))
        if num_held + self.num_arriving + self.num_kept >= self.num_modules:
            self.num_arriving = 0
            raise torch.OutOfMemoryError("no memory")
        self.num_arriving += 1
        return self._to_device(module)

    def free(self, _: torch.device) -> None:
        self.num_kept = 0
        self.num_freed += 1

    def acquire(self, slots: AdapterSlots, *given: Any) -> int | None:
        self.num_arriving = 0
        slot = slots.acquire(*given)
        self.num_arriving = 0
        return slot


@pytest.fixture
def device(
    slots: AdapterSlots,
    hooks: LoraHooks,
    checkpoint: LoraCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> Device:
    """With room for one adapter and a half."""
    made = Device(slots, hooks, len(checkpoint.modules) * 3 // 2)
    monkeypatch.setattr(slots, "_weights", made.put)
    monkeypatch.setattr(faults, "free_memory", made.free)
    return made


def test_an_adapter_nobody_uses_leaves_for_one_that_finds_no_memory(
    slots: AdapterSlots, hooks: LoraHooks, checkpoint: LoraCheckpoint, device: Device
) -> None:
    device.acquire(slots, 1, checkpoint)
    slots.release(1)
    slot = device.acquire(slots, 2, checkpoint)
    assert slot is not None
    assert hooks.weights(slot).keys() == checkpoint.modules.keys()
    assert (slots.resident_uids, slots.num_evictions, device.num_freed) == ([2], 1, 1)


def test_what_torch_keeps_for_later_is_given_back_first(
    slots: AdapterSlots, checkpoint: LoraCheckpoint, device: Device
) -> None:
    device.num_kept = len(checkpoint.modules)
    assert device.acquire(slots, 1, checkpoint) is not None
    assert (slots.resident_uids, device.num_freed) == ([1], 1)


def test_layers_beyond_what_their_users_need_leave_and_no_others(
    slots: AdapterSlots, checkpoint: LoraCheckpoint, device: Device
) -> None:
    device.acquire(slots, 1, checkpoint, 1, NUM_LAYERS)
    assert slots.resident_depths == {1: NUM_LAYERS}
    assert device.acquire(slots, 2, checkpoint, NUM_LAYERS - 1, NUM_LAYERS) is not None
    assert slots.resident_depths == {1: 1, 2: NUM_LAYERS - 1}


def test_without_memory_a_second_time_the_request_fails_and_users_keep_their_layers(
    slots: AdapterSlots, hooks: LoraHooks, checkpoint: LoraCheckpoint, device: Device
) -> None:
    held = device.acquire(slots, 1, checkpoint)
    with pytest.raises(torch.OutOfMemoryError):
        device.acquire(slots, 2, checkpoint)
    assert device.num_freed == 1, "it is tried again once"
    assert held is not None
    assert hooks.weights(held).keys() == checkpoint.modules.keys()
    assert slots.resident_depths == {1: NUM_LAYERS}
    slots.release(1)
    assert device.acquire(slots, 2, checkpoint) is not None


def test_a_failure_that_is_not_of_memory_is_not_tried_again(
    slots: AdapterSlots, checkpoint: LoraCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def broken(_: Any) -> LoraWeights:
        tries.append(1)
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(slots, "_weights", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        slots.acquire(1, checkpoint)
    assert (len(tries), slots.resident_uids) == (1, [])


def test_without_the_second_try_the_adapter_would_not_come(
    slots: AdapterSlots,
    checkpoint: LoraCheckpoint,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of the tests above: where no way is made, the same adapter fails."""
    monkeypatch.setattr(slots, "_make_way", lambda *_: None)
    device.acquire(slots, 1, checkpoint)
    slots.release(1)
    with pytest.raises(torch.OutOfMemoryError):
        device.acquire(slots, 2, checkpoint)


def test_an_adapter_that_is_not_wanted_any_more_leaves_when_its_last_user_has(
    slots: AdapterSlots, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    wanted = {1, 2}
    slots.is_wanted = wanted.__contains__
    slot = slots.acquire(1, checkpoint)
    slots.acquire(2, checkpoint)
    assert slot is not None
    slots.release(2)
    slots.look_for_unwanted()
    slots.drop_unwanted()
    assert slots.resident_uids == [1, 2], "what is wanted stays, used or not"
    wanted.clear()
    slots.drop_unwanted()
    assert slots.resident_uids == [1, 2], "nobody has said yet that something was unloaded"
    slots.look_for_unwanted()
    slots.drop_unwanted()
    assert slots.resident_uids == [1], "2 has no user, 1 has"
    assert hooks.weights(slot).keys() == checkpoint.modules.keys()
    slots.release(1)
    slots.drop_unwanted()
    assert (slots.resident_uids, hooks.weights(slot)) == ([], {})
    assert slots.num_evictions == 0, "nobody came in their place"


def test_an_adapter_that_came_after_it_was_unloaded_leaves_too(
    slots: AdapterSlots, checkpoint: LoraCheckpoint
) -> None:
    slots.is_wanted = lambda _: False
    slots.look_for_unwanted()  # it is not there yet
    slots.acquire(1, checkpoint)
    slots.drop_unwanted()
    assert slots.resident_uids == [1]
    slots.release(1)
    slots.drop_unwanted()
    assert slots.resident_uids == []


def test_an_adapter_in_a_slot_is_held_once(tiny: Tiny) -> None:
    """The slot's tensors are the checkpoint's, as the kernel reads them: no copy is made of either."""
    hooks = LoraHooks(NUM_LAYERS)
    slots = AdapterSlots(hooks, tiny.targets, MAX_LORAS, torch.float32, torch.device("cpu"))
    checkpoint = read_checkpoint(tiny.adapter("a"), tiny.targets)
    slot = slots.acquire(1, checkpoint)
    assert slot is not None
    for name, weights in hooks.weights(slot).items():
        module = checkpoint.modules[name]
        assert weights.lora_A.data_ptr() == module.lora_A.data_ptr()
        assert weights.lora_B.data_ptr() == module.lora_B.data_ptr()
        hooked = hooks._modules[name]
        assert hooked.native is not None
        table = LoraWeightsEntry.from_address(hooked.native._parts[hooked.part].weights)
        assert slot == 0
        assert table.lora_A == module.lora_A.data_ptr()
        assert table.lora_B == module.lora_B.data_ptr()
    slots.clear()


def test_clearing_takes_weights_and_hooks(
    tiny: Tiny, slots: AdapterSlots, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    slot = slots.acquire(1, checkpoint)
    hooks.install(NUM_LAYERS)
    assert num_hooks(tiny.base.model) == len(checkpoint.modules)
    slots.clear()
    assert num_hooks(tiny.base.model) == 0
    assert slot is not None
    assert hooks.weights(slot) == {}
    assert {slots.acquire(uid, checkpoint) for uid in (1, 2)} == {0, 1}
