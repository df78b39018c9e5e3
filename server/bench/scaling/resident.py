"""How many adapters a budget of the device holds, by the depth to which they are kept.

Real slots are filled until one adapter has to leave; nothing runs. The adapters are one checkpoint
under many names: what it takes is the same. On a CPU the budget bounds what slots hold, while the
layers that are left out are in the same memory, so there the numbers say what a GPU would gain.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.filesize import decimal
from rich.table import Table

from server.bench.measure import Spread
from server.bench.scaling.report import spread
from server.config import Settings
from server.loading import ReportProgress
from server.model.adapters import AdapterSlots
from server.model.checkpoint import LoraCheckpoint, read_checkpoint
from server.model.hooks import LoraHooks
from server.model.prepare import prepare
from server.model.runner import ModelRunner

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Resident:
    """One depth. num_fit: adapters in the budget at once. deepen_s: to bring in the layers above."""

    depth: int
    slot_bytes: int
    num_fit: int
    deepen_s: Spread

    @property
    def slots_a_gib(self) -> int:
        """By their bytes."""
        return GIB // self.slot_bytes


def measure_resident(
    settings: Settings,
    depths: Sequence[int],
    budget_slots: int,
    repeat: int,
    progress: ReportProgress,
) -> list[Resident]:
    """Depths of at least 1. budget_slots: as much as so many whole adapters take."""
    runner = prepare(settings).runner
    (path,) = settings.adapter_paths().values()
    checkpoint = read_checkpoint(path, runner.targets)
    whole = _slots(runner, 1, None)
    whole.acquire(0, _copy(checkpoint))
    budget = budget_slots * whole.num_bytes
    whole.clear()
    found = []
    for done, depth in enumerate(depths):
        progress("depths", done, len(depths))
        one = _slots(runner, 1, None)
        one.acquire(0, _copy(checkpoint), depth, depth)
        slot_bytes = one.num_bytes
        one.clear()
        seconds = [_deepen_s(runner, checkpoint, depth) for _ in range(repeat)]
        num_fit = _num_fit(runner, checkpoint, depth, budget, budget // slot_bytes + 1)
        found.append(Resident(depth, slot_bytes, num_fit, Spread.of(seconds)))
    progress("depths", len(depths), len(depths))
    return found


def resident_table(found: Sequence[Resident], budget_slots: int) -> Table:
    """One row a depth."""
    table = Table(caption=f"fit: in the room of {budget_slots} whole ones")
    for title in ("kept below", "bytes a slot", "slots a GiB", "fit", "layers above come in, ms"):
        table.add_column(title, justify="right")
    for one in found:
        table.add_row(
            str(one.depth),
            decimal(one.slot_bytes),
            str(one.slots_a_gib),
            str(one.num_fit),
            spread(one.deepen_s, 1000),
        )
    return table


def _slots(runner: ModelRunner, max_loras: int, max_bytes: int | None) -> AdapterSlots:
    """Slots of their own on the runner's model."""
    hooks = LoraHooks(runner.targets.num_layers)
    model = runner.model
    return AdapterSlots(hooks, runner.targets, max_loras, model.dtype, model.device, max_bytes)


def _copy(checkpoint: LoraCheckpoint) -> LoraCheckpoint:
    """Another adapter of the same content: what slots change of a checkpoint is its own."""
    return replace(checkpoint, modules=dict(checkpoint.modules))


def _num_fit(
    runner: ModelRunner, checkpoint: LoraCheckpoint, depth: int, budget: int, limit: int
) -> int:
    slots = _slots(runner, limit, budget)
    most = 0
    for uid in range(limit):
        slots.acquire(uid, _copy(checkpoint), depth, depth)
        slots.release(uid, depth)
        most = max(most, len(slots.resident_uids))
    slots.clear()
    return most


def _deepen_s(runner: ModelRunner, checkpoint: LoraCheckpoint, depth: int) -> float:
    slots = _slots(runner, 1, None)
    slots.acquire(0, _copy(checkpoint), depth, depth)
    began = time.perf_counter()
    slots.acquire(0, checkpoint, None, depth)
    seconds = time.perf_counter() - began
    slots.clear()
    return seconds
