"""A curve: one engine, one load a point, the points in turn in every repeat.

A noisy minute so hits all points of a repeat alike. No two runs have the same prompts, or the prefix
cache would answer for the later one.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from server.bench.in_process import EngineClient
from server.bench.load import drive
from server.bench.measure import Measurement, Spread, measure
from server.bench.workload import Workload
from server.engine.async_engine import AsyncEngine
from server.loading import ReportProgress

_WARMUP_RUN = -1


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the engine at one value of the curve's quantity."""

    x: int
    workload: Workload
    concurrency: int


@dataclass(frozen=True, slots=True)
class Point:
    """What came of it."""

    x: int
    runs: tuple[Measurement, ...]

    @property
    def tokens_per_s(self) -> Spread:
        """Output tokens a second of its runs."""
        return Spread.of([run.output_tokens_per_s for run in self.runs])

    @property
    def first_token_s(self) -> Spread:
        """The median request's time to its first token, a run."""
        return Spread.of([run.time_to_first_token_s.p50 or 0.0 for run in self.runs])


@dataclass(frozen=True, slots=True)
class Curve:
    """All points, and what went wrong in any."""

    quantity: str
    points: tuple[Point, ...]
    errors: tuple[str, ...]


def measure_curve(
    engine: AsyncEngine,
    quantity: str,
    loads: Sequence[Load],
    repeat: int,
    progress: ReportProgress,
) -> Curve:
    """Warm every load up once with a request for each one in flight, then measure."""
    client = EngineClient(engine)
    errors: list[str] = []

    def run(load: Load, number: int, limit: int | None = None) -> Measurement:
        items = load.workload.run(number)[:limit]
        result = asyncio.run(drive(client, items, load.concurrency))
        errors.extend(timing.error for timing in result.timings if timing.error is not None)
        return measure(result)

    total = len(loads) * (1 + repeat)
    for done, load in enumerate(loads):
        progress(quantity, done, total)
        run(load, _WARMUP_RUN - done, load.concurrency)
    runs: list[list[Measurement]] = [[] for _ in loads]
    for number in range(len(loads) * repeat):
        progress(quantity, len(loads) + number, total)
        index = number % len(loads)
        runs[index].append(run(loads[index], number))
    progress(quantity, total, total)
    points = tuple(Point(load.x, tuple(own)) for load, own in zip(loads, runs, strict=True))
    return Curve(quantity, points, tuple(sorted(set(errors))))
