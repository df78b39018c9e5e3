"""A clock that stands while a server's engine waits for a processor, and a load that is sent by it.

On a machine that others use, an engine's steps take several times as long by the wall's clock as they
compute, never twice the same. So while a server has requests, time here is what its engine's thread has
computed, as the system counts it; while it has none, time is everybody's. Arrivals are sent and tokens
noted by this clock. What the event loop and the client take is not in it. Linux alone.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from server.bench.load import Client, LoadResult, RequestFailed, Timing
from server.bench.workload import WorkItem

_TICK_S = 0.002


class EngineClock:
    """Seconds since it was made. thread: the id of the engine's thread of process `pid`."""

    def __init__(self, pid: int, thread: int) -> None:
        self._file = Path(f"/proc/{pid}/task/{thread}/schedstat")
        self._wall_s, self._cpu_s = time.perf_counter(), self.cpu_s()
        self._now_s = 0.0
        self.num_requests = 0
        """That the server has: whether it is busy."""

    def cpu_s(self) -> float:
        """What the thread has computed since it began."""
        return int(self._file.read_text().split()[0]) / 1e9

    def now_s(self) -> float:
        """Look at both clocks, and go on by one of them."""
        wall_s, cpu_s = time.perf_counter(), self.cpu_s()
        gained_s = cpu_s - self._cpu_s if self.num_requests else wall_s - self._wall_s
        self._wall_s, self._cpu_s = wall_s, cpu_s
        self._now_s += gained_s
        return self._now_s


async def drive_by(clock: EngineClock, client: Client, items: Sequence[WorkItem]) -> LoadResult:
    """Send items, in order of arrival, each at its own time, as `load.drive` does by the wall's clock."""
    tasks = []
    for item in items:
        while clock.now_s() < item.arrival_s:
            await asyncio.sleep(_TICK_S)
        clock.num_requests += 1
        tasks.append(asyncio.create_task(_send(clock, client, item)))
    timings = await asyncio.gather(*tasks)
    return LoadResult(clock.now_s(), tuple(timings))


async def _send(clock: EngineClock, client: Client, item: WorkItem) -> Timing:
    timing = Timing(item.arrival_s, num_prompt_tokens=len(item.prompt))
    try:
        async for piece in client.stream(item):
            timing.piece_s += [clock.now_s()] * (piece.num_tokens > 0)
            if piece.num_output_tokens is not None:
                timing.num_output_tokens = piece.num_output_tokens
    except RequestFailed as error:
        timing.error = str(error)
    timing.end_s = clock.now_s()
    clock.num_requests -= 1
    if timing.error is None and timing.num_output_tokens != item.output_len:
        timing.error = f"{timing.num_output_tokens} tokens came, {item.output_len} were asked for"
    return timing
