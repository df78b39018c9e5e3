"""Step costs of this machine: timed steps over a grid and of a mixed load, fitted, and tested on another
mixed load that took no part.

Costs are processor seconds of the engine's one thread, which other work on the machine hardly changes; what
it does change, how long the thread waits for a processor, is stated beside them as `slowdown`.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import torch

from server.bench.capacity.cost import Costs, LoadCosts, Residual, fit, residual
from server.bench.capacity.timed_steps import Decoding, Prefill, StepTimer, TimedStep
from server.config import ConfigError, Settings
from server.engine.core import EngineCore
from server.loading import ReportProgress
from server.model.checkpoint import read_checkpoint

MAX_ROWS = 64
MAX_LEN = 1024
"""Of a sequence of the grid."""

MAX_LORAS = 8

_DECODING = (
    (1, 48), (2, 48), (4, 48), (8, 48), (16, 64), (32, 80), (64, 96), (1, 512), (8, 256), (16, 256),
)  # fmt: skip
"""Rows and keys read by each, of the base model."""

_DECODING_LORA = (
    (1, 48, 1),
    (4, 48, 1),
    (4, 48, 4),
    (8, 48, 8),
    (16, 64, 1),
    (16, 64, 8),
    (32, 80, 8),
)
"""And adapters among them, each whole and to half of the layers."""

_PREFILL = ((16, 0), (32, 0), (64, 0), (128, 0), (512, 0), (900, 0), (64, 8), (256, 8), (64, 32))
"""Prompt tokens, and rows that decode beside them, of the base model."""

_PREFILL_LORA = ((64, 0, 1), (256, 0, 1), (64, 16, 8))


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on this machine.

    fitted: on the steps that were fitted. tested: on a mixed load that was not.
    slowdown: clock over processor time of all steps.
    disk_warm_s, disk_cold_s: reading an adapter, by the clock, its file in the system's cache or not.
    """

    model: str
    num_layers: int
    adapter_bytes: int
    costs: Costs
    fitted: Residual
    tested: Residual
    slowdown: float
    disk_warm_s: float
    disk_cold_s: float


def grid(num_adapters: int, num_layers: int, max_len: int) -> list[Decoding | Prefill]:
    """Every situation, for as many adapters as there are, whose sequences are not longer than that."""
    found: list[Decoding | Prefill] = [Decoding(*pair, 0) for pair in _DECODING]
    found += [Prefill(*pair, 0) for pair in _PREFILL]
    for depth in (None, num_layers // 2):
        for rows, context, adapters in _DECODING_LORA:
            found.append(Decoding(rows, context, min(adapters, num_adapters), depth))
        for prompt, rows, adapters in _PREFILL_LORA:
            found.append(Prefill(prompt, rows, min(adapters, num_adapters), depth))
    return [one for one in dict.fromkeys(found) if one.max_len <= max_len]


def require_one_thread() -> None:
    """Raise ConfigError where torch computes on more: their waiting for each other would count as work."""
    if torch.get_num_threads() != 1:
        raise ConfigError(
            f"OMP_NUM_THREADS should be 1, because costs are those of one thread (torch has"
            f" {torch.get_num_threads()})"
        )


def measure_costs(settings: Settings, rounds: int, seed: int, progress: ReportProgress) -> Measured:
    """Load the model on this thread and time it.

    settings: with named adapters, `max_loras` of `MAX_LORAS` and a cache for `MAX_ROWS` of `MAX_LEN` tokens.
    """
    require_one_thread()
    core = EngineCore.from_settings(settings)
    try:
        adapters = list(settings.adapter)
        for name, path in settings.adapter.items():
            core.registry.load(name, path)
        timer = StepTimer(core, seed)
        on_device = adapters[:MAX_LORAS]
        situations = grid(len(on_device), core.info.num_layers, core.info.max_model_len)
        steps: list[TimedStep] = []
        for number in range(rounds):
            Random(f"{seed}/order/{number}").shuffle(situations)
            for done, situation in enumerate(situations):
                progress("steps", number * len(situations) + done, rounds * len(situations))
                steps += run_situation(timer, situation, on_device)
        progress("steps", rounds * len(situations), rounds * len(situations))
        progress("mixed loads", 0, 3)
        _mixed_load(timer, core, on_device, f"{seed}/0")  # until most numbers of rows are replayed
        steps += _mixed_load(timer, core, on_device, f"{seed}/1")
        mixed = _mixed_load(timer, core, on_device, f"{seed}/2")
        progress("mixed loads", 3, 3)
        step_costs = fit(steps)
        slot_s = _slot_load_s(timer, core, adapters)
        path = settings.adapter_paths()[adapters[0]]
        disk_warm_s, disk_cold_s = (_read_s(core, path, is_cold) for is_cold in (False, True))
        every = [*steps, *mixed]
        return Measured(
            core.info.name,
            core.info.num_layers,
            core.registry.loaded()[0].num_bytes,
            Costs(step_costs, LoadCosts(disk_cold_s, slot_s)),
            residual(step_costs, steps),
            residual(step_costs, mixed),
            sum(step.wall_s for step in every) / sum(step.cpu_s for step in every),
            disk_warm_s,
            disk_cold_s,
        )
    finally:
        core.close()


def run_situation(
    timer: StepTimer, situation: Decoding | Prefill, adapters: Sequence[str]
) -> list[TimedStep]:
    """The median step of a situation of one kind, or every chunk of a prompt."""
    if isinstance(situation, Prefill):
        return timer.prefill(situation, adapters)
    steps = timer.decode(situation, adapters)
    return [sorted(steps, key=lambda step: step.cpu_s)[len(steps) // 2]]


def _mixed_load(
    timer: StepTimer, core: EngineCore, adapters: Sequence[str], seed: str
) -> list[TimedStep]:
    """Requests of all kinds that come while others run; every step of them."""
    random = Random(seed)
    depths = (None, core.info.num_layers // 2, 1)
    steps: list[TimedStep] = []
    for _ in range(48):
        adapter = random.choice([None, *adapters])
        timer.add(random.randint(8, 160), random.randint(2, 40), adapter, random.choice(depths))
        for _ in range(random.randint(0, 6)):
            steps += _one(timer)
    while core.has_work:
        steps += _one(timer)
    return steps


def _one(timer: StepTimer) -> list[TimedStep]:
    timed = timer.step()
    return [] if timed is None else [timed]


def _slot_load_s(timer: StepTimer, core: EngineCore, adapters: Sequence[str]) -> float:
    """Processor seconds by which a request takes longer whose adapter is not in a slot; 0 if all fit."""
    if len(adapters) <= MAX_LORAS:
        return 0.0

    def seconds(adapter: str) -> float:
        timer.add(16, 4, adapter, None)
        began_s = time.thread_time()
        while core.has_work:
            core.step()
        return time.thread_time() - began_s

    differences = []
    for _ in range(3):
        for (
            adapter
        ) in adapters:  # one more than there are slots: the least recently used is never there
            with_load = seconds(adapter)
            differences.append(with_load - seconds(adapter))
    return max(0.0, median(differences))


def _read_s(core: EngineCore, path: Path, is_cold: bool) -> float:
    found = []
    for _ in range(7):
        if is_cold:
            _forget(path)
        began_s = time.perf_counter()
        read_checkpoint(path, core.runner.targets)
        found.append(time.perf_counter() - began_s)
    return median(found)


def _forget(directory: Path) -> None:
    """Ask the system to drop a directory's files from its cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
