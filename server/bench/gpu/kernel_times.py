"""What a device does in a decode step: each kernel, how often, for how long, and how long it waits."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_NAME_LENGTH = 70


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel's share of a step."""

    name: str
    launches: float
    """A step."""
    microseconds: float
    """A step, all launches together."""


def kernel_times(step: Callable[[], None], num_steps: int) -> list[KernelTime]:
    """The kernels of `num_steps` calls of `step`, longest first. Empty where there is no CUDA device."""
    if not torch.cuda.is_available():
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiled.events():
        if event.device_type.name == "CUDA":
            found[event.name[:_NAME_LENGTH]].append(event.device_time)
    times = [
        KernelTime(name, len(each) / num_steps, sum(each) / num_steps)
        for name, each in found.items()
    ]
    return sorted(times, key=lambda time: -time.microseconds)
