"""Device slots: who is on the device, who goes when another comes, and what stays behind: nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from server.model.adapters import AdapterSlots
from server.model.checkpoint import LoraCheckpoint, read_checkpoint
from server.model.hooks import LoraHooks
from server.model.lora import LoraWeights
from server.model.native.library import LoraWeightsEntry
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
