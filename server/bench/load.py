"""Sends a run's items and notes when what came back: closed loop or open loop.

Closed: `concurrency` clients, each sending its next request when its last one ends. Open: every
request leaves at its own time, however many are under way, and its latency counts from the time it
was meant to leave, so that a driver that falls behind does not hide a server that does.
Knows no engine and no HTTP, only a `Client`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from server.bench.workload import WorkItem


@dataclass(frozen=True, slots=True)
class Piece:
    """One message of a stream: tokens it carried, and counts that came with it."""

    num_tokens: int = 0
    num_output_tokens: int | None = None
    """The server's own total, where the message states it; over HTTP one message may be two tokens."""
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine counted since its start."""

    num_steps: int
    num_preemptions: int
    num_recomputed_tokens: int
    num_cached_tokens: int
    layers_applied: int
    layers_skipped: int

    def since(self, before: "Counters") -> "Counters":
        """The difference."""
        return Counters(
            self.num_steps - before.num_steps,
            self.num_preemptions - before.num_preemptions,
            self.num_recomputed_tokens - before.num_recomputed_tokens,
            self.num_cached_tokens - before.num_cached_tokens,
            self.layers_applied - before.layers_applied,
            self.layers_skipped - before.layers_skipped,
        )


class Client(Protocol):
    """Something that completes requests."""

    def stream(self, item: WorkItem) -> AsyncIterator[Piece]:
        """Complete one item. Raises RequestFailed."""

    async def counters(self) -> Counters | None:
        """The engine's counters once it is idle; None where they cannot be seen."""


class RequestFailed(Exception):
    """A request that ended in an error; the message is the server's."""


@dataclass(slots=True)
class Timing:
    """One request as its client saw it; times are seconds after the run's start."""

    start_s: float
    piece_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One run."""

    duration_s: float
    timings: tuple[Timing, ...]
    counters: Counters | None = None


async def drive(client: Client, items: Iterable[WorkItem], concurrency: int | None) -> LoadResult:
    """Run all items; a `concurrency` of None is the open loop.

    The closed loop takes each item when a client is free for it, so that they may be made as it goes.
    """
    before = await client.counters()
    started_s = time.perf_counter()
    if concurrency is None:
        timings = await asyncio.gather(
            *(_send_at(client, item, started_s, item.arrival_s) for item in items)
        )
    else:
        timings = await _closed_loop(client, items, concurrency, started_s)
    duration_s = time.perf_counter() - started_s
    after = await client.counters()
    counters = None if before is None or after is None else after.since(before)
    return LoadResult(duration_s, tuple(timings), counters)


async def _closed_loop(
    client: Client, items: Iterable[WorkItem], concurrency: int, started_s: float
) -> list[Timing]:
    waiting = iter(items)
    timings: list[Timing] = []

    async def work() -> None:
        for item in waiting:  # shared: whoever is free takes the next
            timings.append(await _send(client, item, started_s, time.perf_counter() - started_s))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return timings


async def _send_at(client: Client, item: WorkItem, started_s: float, arrival_s: float) -> Timing:
    await asyncio.sleep(max(0.0, started_s + arrival_s - time.perf_counter()))
    return await _send(client, item, started_s, arrival_s)


async def _send(client: Client, item: WorkItem, started_s: float, start_s: float) -> Timing:
    timing = Timing(start_s, num_prompt_tokens=len(item.prompt))
    num_tokens, stated = 0, None
    try:
        async for piece in client.stream(item):
            if piece.num_tokens:
                timing.piece_s.append(time.perf_counter() - started_s)
                num_tokens += piece.num_tokens
            if piece.num_output_tokens is not None:
                stated = piece.num_output_tokens
            if piece.num_cached_tokens is not None:
                timing.num_cached_tokens = piece.num_cached_tokens
    except RequestFailed as error:
        timing.error = str(error)
    timing.end_s = time.perf_counter() - started_s
    timing.num_output_tokens = num_tokens if stated is None else stated
    if timing.error is None and timing.num_output_tokens != item.output_len:
        timing.error = f"{timing.num_output_tokens} tokens came, {item.output_len} were asked for"
    return timing
