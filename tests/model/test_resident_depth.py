"""Slots that hold an adapter's lower layers: what comes when, what goes first, and how many fit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from server.errors import AdapterError, ModelError
from server.model.adapters import AdapterSlots
from server.model.checkpoint import LoraCheckpoint, read_checkpoint
from server.model.hooks import LoraHooks
from server.model.lora import LoraWeights
from server.model.residency import slot_bytes
from tests.parity.zoo import NUM_LAYERS
from tests.tiny import Tiny, num_hooks

CPU = torch.device("cpu")
KEEP = 2


@pytest.fixture
def hooks(tiny: Tiny) -> Iterator[LoraHooks]:
    made = LoraHooks(NUM_LAYERS)
    yield made
    made.install(0)
    assert num_hooks(tiny.base.model) == 0


@pytest.fixture
def checkpoint(tiny: Tiny) -> LoraCheckpoint:
    return read_checkpoint(tiny.adapter("a"), tiny.targets)


def make_slots(
    tiny: Tiny, hooks: LoraHooks, max_bytes: int | None = None, max_loras: int = 8
) -> AdapterSlots:
    return AdapterSlots(hooks, tiny.targets, max_loras, torch.float32, CPU, max_bytes)


def layer_bytes(checkpoint: LoraCheckpoint) -> int:
    """Of one layer; all are alike."""
    total = slot_bytes(checkpoint, checkpoint.modules, torch.float32)
    assert total % NUM_LAYERS == 0
    return total // NUM_LAYERS


def layers_in(hooks: LoraHooks, checkpoint: LoraCheckpoint, slot: int | None) -> set[int]:
    assert slot is not None
    return {checkpoint.layers[name] for name in hooks.weights(slot)}


def test_only_what_is_kept_comes_and_more_when_it_is_needed(
    tiny: Tiny, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    slots = make_slots(tiny, hooks)
    expected = {name: module.lora_A.clone() for name, module in checkpoint.modules.items()}
    slot = slots.acquire(1, checkpoint, 1, KEEP)
    assert layers_in(hooks, checkpoint, slot) == {0, 1}
    assert (slots.resident_depths, slots.num_bytes) == ({1: 2}, 2 * layer_bytes(checkpoint))
    below = hooks.weights(0)
    assert slots.acquire(1, checkpoint, 4, KEEP) == slot
    assert layers_in(hooks, checkpoint, slot) == {0, 1, 2, 3}
    assert slots.num_bytes == 4 * layer_bytes(checkpoint)
    above = hooks.weights(0)
    assert all(above[name] is weights for name, weights in below.items())  # not loaded again
    for name, weights in above.items():
        assert torch.equal(weights.lora_A, expected[name])
    for depth in (1, 4):
        slots.release(1, depth)
    assert (slots.num_users, slots.resident_depths) == (0, {1: 4})  # nobody wants the room
    slots.clear()
    assert (slots.num_bytes, slots.resident_depths) == (0, {})


@pytest.mark.parametrize(("keep", "fit"), [(None, 2), (4, 2), (2, 4), (1, 8), (3, 2)])
def test_more_adapters_fit_the_less_of_each_is_kept(
    tiny: Tiny, hooks: LoraHooks, keep: int | None, fit: int
) -> None:
    checkpoints = [read_checkpoint(tiny.adapter("a"), tiny.targets) for _ in range(10)]
    slots = make_slots(tiny, hooks, 8 * layer_bytes(checkpoints[0]), max_loras=10)
    most = 0
    for uid, checkpoint in enumerate(checkpoints):
        depth = NUM_LAYERS if keep is None else keep
        assert slots.acquire(uid, checkpoint, depth, keep) is not None
        slots.release(uid, depth)
        most = max(most, len(slots.resident_uids))
    assert most == fit


def test_layers_that_nobody_needs_go_first_then_adapters_then_what_is_only_kept(
    tiny: Tiny, hooks: LoraHooks
) -> None:
    a, b, c = (read_checkpoint(tiny.adapter("a"), tiny.targets) for _ in range(3))
    slots = make_slots(tiny, hooks, 7 * layer_bytes(a))
    slots.acquire(1, a, 4, KEEP)
    slots.release(1, 4)
    slots.acquire(2, b, 1, 3)
    assert slots.resident_depths == {1: 4, 2: 3}  # seven layers
    slots.acquire(3, c, 1, 1)
    assert slots.resident_depths == {1: 2, 2: 3, 3: 1}  # the layers above what 1 keeps went
    slots.acquire(3, c, 3, 1)
    assert slots.resident_depths == {2: 3, 3: 3}  # then 1, which nobody uses
    slots.acquire(3, c, 4, 1)
    assert slots.resident_depths == {2: 3, 3: 4}
    slots.acquire(2, b, 2, 4)  # what it would keep is not worth another's layer
    assert slots.resident_depths == {3: 4, 2: 3}
    for depth in (3, 4):
        slots.release(3, depth)
    assert slots.acquire(2, b, 4, 4) is not None
    assert slots.resident_depths == {3: 1, 2: 4}
    assert slots.acquire(3, c, 4, 1) is None  # 2 needs all of its own
    assert slots.resident_depths == {3: 1, 2: 4}
    slots.release(2, 4)
    assert slots.acquire(3, c, 4, 1) is not None  # ... and now only two
    assert slots.resident_depths == {2: 2, 3: 4}


def test_what_does_not_fit_alone_is_refused(
    tiny: Tiny, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    """Waiting for room would be for ever."""
    slots = make_slots(tiny, hooks, 3 * layer_bytes(checkpoint))
    with pytest.raises(AdapterError, match=rf"max_lora_bytes is {3 * layer_bytes(checkpoint)}"):
        slots.acquire(1, checkpoint, 4, KEEP)
    assert slots.resident_depths == {}
    assert slots.acquire(1, checkpoint, 3, 4) is not None  # of what is kept, as much as fits
    assert slots.resident_depths == {1: 3}


def test_layers_that_left_are_whole_in_host_memory_and_come_back(
    tiny: Tiny, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    expected = {n: (m.lora_A.clone(), m.lora_B.clone()) for n, m in checkpoint.modules.items()}
    other = read_checkpoint(tiny.adapter("b"), tiny.targets)
    slots = make_slots(tiny, hooks, 5 * layer_bytes(checkpoint))
    for _ in range(2):
        assert slots.acquire(1, checkpoint, 4, 1) is not None
        slots.release(1, 4)
        assert slots.acquire(2, other, 4, 4) is not None
        slots.release(2, 4)
        assert slots.resident_depths == {1: 1, 2: 4}
        for name, module in checkpoint.modules.items():
            assert torch.equal(module.lora_A, expected[name][0])
            assert torch.equal(module.lora_B, expected[name][1])


def test_deepening_that_fails_leaves_what_was_there(
    tiny: Tiny, hooks: LoraHooks, checkpoint: LoraCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = make_slots(tiny, hooks)
    slot = slots.acquire(1, checkpoint, 2, KEEP)
    to_device = slots._weights
    num_calls = 0

    def weights(module: Any) -> LoraWeights:
        nonlocal num_calls
        num_calls += 1
        if num_calls in (3, 6):  # and when it is tried again
            raise torch.OutOfMemoryError("no memory")
        return to_device(module)

    monkeypatch.setattr(slots, "_weights", weights)
    with pytest.raises(torch.OutOfMemoryError):
        slots.acquire(1, checkpoint, 4, KEEP)
    assert layers_in(hooks, checkpoint, slot) == {0, 1}
    assert (slots.resident_depths, slots.num_users) == ({1: 2}, 1)
    assert slots.acquire(1, checkpoint, 4, KEEP) == slot
    assert layers_in(hooks, checkpoint, slot) == {0, 1, 2, 3}


def test_a_step_deeper_than_its_slot_is_an_error(
    tiny: Tiny, hooks: LoraHooks, checkpoint: LoraCheckpoint
) -> None:
    slots = make_slots(tiny, hooks)
    slot = slots.acquire(1, checkpoint, 2, KEEP)
    assert slot is not None
    for depth in range(3):
        slots.check(slot, depth)
    with pytest.raises(ModelError, match="below depth 2, not 3"):
        slots.check(slot, 3)
    slots.acquire(1, checkpoint)
    slots.check(slot, NUM_LAYERS)
    lent = slots.lend(checkpoint)
    slots.check(lent, NUM_LAYERS)
