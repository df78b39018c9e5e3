"""Why a depth saves what it saves: LoRA's bytes and kernel launches, counted, beside the measured step.

A decode step of rows that all reach depth `d` does LoRA in `d` layers. Each of those must read the
adapters' weights and multiply the rows with them, which takes at least

    max(bytes / bandwidth, flops / peak) + launches * launch_s

with this machine's own three numbers, measured here. Launches are what was dispatched: kernels on a
GPU; on a CPU every operator that computes, views left out.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.bench.measure import Spread
from server.config import Settings
from server.loading import ReportProgress
from server.model.batch import BatchedSequence
from server.model.checkpoint import read_checkpoint
from server.model.prepare import prepare
from server.model.runner import ModelRunner

_NUM_STEPS = 5
"""Steps of one timing, of which the median counts."""


_NUM_FIRST_STEPS = 3
"""At each depth, before anything is counted."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Three limits of this device, as torch reaches them here."""

    bytes_per_s: float
    flops_per_s: float
    launch_s: float

    def least_s(self, num_bytes: float, num_flops: float, num_launches: float) -> float:
        """What such work takes at least."""
        return (
            max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)
            + num_launches * self.launch_s
        )


@dataclass(frozen=True, slots=True)
class StepCost:
    """A decode step at one depth. lora_*: of all layers below it."""

    depth: int
    seconds: Spread
    num_launches: int
    lora_bytes: int
    lora_flops: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Steps at depth 0, some between, and the full depth; all with the same rows."""

    num_rows: int
    num_adapters: int
    machine: Machine
    steps: tuple[StepCost, ...]

    def saved_s(self, step: StepCost) -> float:
        """Measured: how much faster it is than the deepest step."""
        return self.steps[-1].seconds.median - step.seconds.median

    def explained_s(self, step: StepCost) -> float:
        """What bytes, products and launches that it leaves out take at least."""
        last = self.steps[-1]
        return self.machine.least_s(
            last.lora_bytes - step.lora_bytes,
            last.lora_flops - step.lora_flops,
            last.num_launches - step.num_launches,
        )


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that compute; one that only returns another view of its input does not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operator."""
        self.num_launches += not func.is_view
        return func(*args, **(kwargs or {}))


def count_launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels of one call on a GPU; on a CPU, torch's operators that compute."""
    if device.type != "cuda":
        counter = LaunchCounter()
        with counter:
            run()
        return counter.num_launches
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    num_kernels: int = sum(event.device_type().name == "CUDA" for event in events)
    return num_kernels


def explain(
    settings: Settings,
    depths: Sequence[int],
    *,
    num_rows: int,
    context_len: int,
    repeat: int,
    progress: ReportProgress,
) -> Explanation:
    """Load the model without an engine, and run decode steps of `num_rows` at each depth, in turn.

    depths: rising, the last one the full depth.
    """
    runner = prepare(settings).runner
    adapters = list(settings.adapter_paths().values())
    slots = []
    for uid, path in enumerate(adapters):
        slot = runner.slots.acquire(uid, read_checkpoint(path, runner.targets))
        assert slot is not None  # there is one for each
        slots.append(slot)
    try:
        device = runner.model.device
        batches = [_batch(runner, slots, depth, num_rows, context_len) for depth in depths]
        # What the first steps allocate and note is no part of any other.
        for batch in batches * _NUM_FIRST_STEPS:
            runner.run(batch)
        launches = []
        for batch in batches:
            before = runner.num_kernel_calls
            num_launches = count_launches(partial(runner.run, batch), device)
            launches.append(num_launches + runner.num_kernel_calls - before)
        seconds: list[list[float]] = [[] for _ in batches]
        for done in range(repeat):
            progress("steps", done, repeat)
            for own, batch in zip(seconds, batches, strict=True):
                own.append(_seconds(partial(runner.run, batch), device, _NUM_STEPS))
        progress("steps", repeat, repeat)
        steps = tuple(
            StepCost(depth, Spread.of(own), number, *_lora_work(runner, slots, depth, num_rows))
            for depth, own, number in zip(depths, seconds, launches, strict=True)
        )
        machine = measure_machine(device, runner.model.dtype)
    finally:
        runner.close()
    return Explanation(num_rows, len(slots), machine, steps)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The device's bandwidth, arithmetic and cost of a call, each the best of a few tries."""
    big = torch.ones(1 << 26, dtype=dtype, device=device)
    width = 2048
    square = torch.ones(width, width, dtype=dtype, device=device)
    one = torch.ones(1, dtype=dtype, device=device)
    num_calls = 1000

    def calls() -> None:
        for _ in range(num_calls):
            one.add_(1)

    with torch.inference_mode():
        read_s = min(_seconds(big.sum, device, 1) for _ in range(5))
        multiply_s = min(_seconds(lambda: square @ square, device, 1) for _ in range(5))
        call_s = min(_seconds(calls, device, 1) for _ in range(5))
    return Machine(big.nbytes / read_s, 2 * width**3 / multiply_s, call_s / num_calls)


def _batch(
    runner: ModelRunner, slots: Sequence[int], depth: int, num_rows: int, context_len: int
) -> list[BatchedSequence]:
    num_blocks = runner.cache.num_blocks_for(context_len + 1)
    return [
        BatchedSequence(
            token_ids=[1],
            start=context_len,
            block_table=list(range(row * num_blocks, (row + 1) * num_blocks)),
            slot=slots[row % len(slots)],
            depth=depth,
            num_logits=1,
        )
        for row in range(num_rows)
    ]


def _lora_work(
    runner: ModelRunner, slots: Sequence[int], depth: int, num_rows: int
) -> tuple[int, int]:
    """Bytes of the weights in the slots below a depth, read once each, and the rows' products."""
    num_bytes = num_flops = 0
    for index, slot in enumerate(slots):
        own_rows = len(range(index, num_rows, len(slots)))
        for name, lora in runner.hooks.weights(slot).items():
            if runner.targets[name].layer_idx < depth:
                num_bytes += lora.lora_A.nbytes + lora.lora_B.nbytes
                num_flops += 2 * own_rows * (lora.lora_A.numel() + lora.lora_B.numel())
    return num_bytes, num_flops


def _seconds(run: Callable[[], object], device: torch.device, times: int) -> float:
    seconds = []
    for _ in range(times):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
