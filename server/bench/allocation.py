"""What a piece of work allocates at once, counted in the allocator's own events.

On a CPU. Resident memory would say little: the allocator keeps what was freed, and Python, weights
and libraries are far larger.
"""

import gc
from collections.abc import Callable
from itertools import accumulate

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was allocated at once on the CPU and not before."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    memory = sorted(
        (event for event in events if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    totals: list[int] = list(accumulate(event.nbytes() for event in memory))
    return max(totals, default=0)
