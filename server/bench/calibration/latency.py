"""Time between the tokens of steady streams, with and without a calibration beside them.

One engine in this process and so many streams that never pause: as one ends, the next begins.
Calibrating and quiet runs take turns. A calibrating run lasts until its job has ended, or until a
limit; the quiet run after it lasts as long. Tokens that came later, when streams were no longer
renewed, do not count. The job is the server's own pipeline.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from typing import Any, cast

from boundary.calibrate import CalibrationOptions
from boundary.dataset import Dataset
from boundary.progress import Progress
from server.bench.in_process import EngineClient
from server.bench.load import LoadResult, drive
from server.bench.measure import percentile
from server.bench.workload import WorkItem, Workload
from server.calibration.generation import GenerationOptions
from server.calibration.outcome import Outcome
from server.calibration.pipeline import calibrate
from server.engine.async_engine import AsyncEngine
from server.engine.background import MakeSlices, SliceHost, Slices
from server.engine.protocol import Engine
from server.errors import GenerationError
from server.loading import ReportProgress

PERCENTS = (50, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class JobFacts:
    """One calibration.

    slice_s: of the work between steps, in the order it was done. Texts that the job generates run as
        requests and are not among them.
    """

    seconds: float
    is_finished: bool
    slice_s: tuple[float, ...]

    @property
    def share(self) -> float:
        """Of its time, how much went to its slices."""
        return sum(self.slice_s) / self.seconds


@dataclass(frozen=True, slots=True)
class StreamRun:
    """One run: gaps between the tokens of a stream in seconds, by percent, and the job beside it."""

    num_requests: int
    num_gaps: int
    gap_s: Mapping[int, float]
    errors: tuple[str, ...]
    job: JobFacts | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A calibrating run and the quiet one after it."""

    calibrating: StreamRun
    quiet: StreamRun

    def ratio(self, percent: int) -> float:
        """How many times as long as in the quiet run."""
        return self.calibrating.gap_s[percent] / self.quiet.gap_s[percent]


@dataclass(frozen=True, slots=True)
class CalibrationLatency:
    """What was found. alone: the same job on an idle engine."""

    alone: JobFacts
    pairs: tuple[Pair, ...]

    @property
    def is_finished(self) -> bool:
        """Whether every job ended within its limit."""
        return all(
            p.calibrating.job is not None and p.calibrating.job.is_finished for p in self.pairs
        )

    @property
    def errors(self) -> list[str]:
        """What requests failed with, each once."""
        return sorted({e for p in self.pairs for e in (*p.quiet.errors, *p.calibrating.errors)})


@dataclass(frozen=True, slots=True)
class Job:
    """What is calibrated, again and again, and how long it may take beside streams."""

    adapter: str
    dataset: Dataset
    options: CalibrationOptions
    generation: GenerationOptions
    limit_s: float


async def measure_latency(
    engine: AsyncEngine,
    workload: Workload,
    job: Job,
    *,
    num_streams: int,
    repeat: int,
    progress: ReportProgress,
) -> CalibrationLatency:
    """The job alone, a warm-up of the streams, then calibrating and quiet runs in turn."""
    items = _endless(workload)
    total = 1 + 2 * repeat
    progress("runs", 0, total)
    alone = await _alone(engine, job)
    client = EngineClient(engine)
    await drive(client, list(islice(items, num_streams)), num_streams)
    pairs = []
    for done in range(repeat):
        progress("runs", 1 + 2 * done, total)
        calibrating, seconds = await _calibrating(engine, client, items, job, num_streams)
        progress("runs", 2 + 2 * done, total)
        quiet = await _quiet(client, items, num_streams, seconds)
        pairs.append(Pair(calibrating, quiet))
    progress("runs", total, total)
    return CalibrationLatency(alone, tuple(pairs))


def stream_run(result: LoadResult, until_s: float, job: JobFacts | None = None) -> StreamRun:
    """Of gaps that ended by `until_s`, in seconds after the run's start.

    Raises GenerationError where there are none.
    """
    gaps = [
        later - earlier
        for timing in result.timings
        for earlier, later in pairwise(timing.piece_s)
        if later <= until_s
    ]
    errors = tuple(sorted({t.error for t in result.timings if t.error is not None}))
    if not gaps:
        raise GenerationError("; ".join([f"no stream got two tokens in {until_s:.3g} s", *errors]))
    by_percent = {percent: percentile(gaps, percent) or 0.0 for percent in PERCENTS}
    return StreamRun(len(result.timings), len(gaps), by_percent, errors, job)


@dataclass(slots=True)
class TimedEngine:
    """An engine whose slices are timed; everything else is the engine's own."""

    engine: AsyncEngine
    slice_s: list[float] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def run_slices(self, make: MakeSlices, on_progress: Callable[[Any], None]) -> Any:
        """See `protocol.Engine.run_slices`."""
        return await self.engine.run_slices(lambda host: self._timed(make, host), on_progress)

    def _timed(self, make: MakeSlices, host: SliceHost) -> Slices:
        slices = make(host)
        try:
            while True:
                began = time.perf_counter()
                try:
                    progress = next(slices)
                except StopIteration as end:
                    return end.value
                finally:
                    self.slice_s.append(time.perf_counter() - began)
                yield progress
        finally:
            slices.close()


async def _alone(engine: AsyncEngine, job: Job) -> JobFacts:
    timed = TimedEngine(engine)
    began = time.perf_counter()
    await _calibrate(timed, job)
    return JobFacts(time.perf_counter() - began, True, tuple(timed.slice_s))


async def _calibrating(
    engine: AsyncEngine,
    client: EngineClient,
    items: Iterator[WorkItem],
    job: Job,
    num_streams: int,
) -> tuple[StreamRun, float]:
    """And how long it took."""
    timed = TimedEngine(engine)
    began = time.perf_counter()
    ended: list[float] = []
    task = asyncio.ensure_future(_calibrate(timed, job))
    task.add_done_callback(lambda _: ended.append(time.perf_counter()))

    def is_wanted() -> bool:
        return not task.done() and time.perf_counter() - began < job.limit_s

    try:
        result = await drive(client, _while(is_wanted, items), num_streams)
        is_finished = task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()  # raises what the job did
    seconds = min(ended[0] - began, job.limit_s)
    facts = JobFacts(seconds, is_finished, tuple(timed.slice_s))
    return stream_run(result, seconds, facts), seconds


async def _quiet(
    client: EngineClient, items: Iterator[WorkItem], num_streams: int, seconds: float
) -> StreamRun:
    began = time.perf_counter()
    wanted = _while(lambda: time.perf_counter() - began < seconds, items)
    return stream_run(await drive(client, wanted, num_streams), seconds)


async def _calibrate(engine: TimedEngine, job: Job) -> Outcome:
    return await calibrate(
        cast(Engine, engine),
        await engine.engine.resolve(job.adapter),
        job.dataset,
        job.options,
        job.generation,
        _nothing,
    )


def _endless(workload: Workload) -> Iterator[WorkItem]:
    """Run after run of a workload: lengths repeat, prompts never do."""
    for number in count():
        yield from workload.run(number)


def _while(is_wanted: Callable[[], bool], items: Iterator[WorkItem]) -> Iterator[WorkItem]:
    while is_wanted():
        yield next(items)


def _nothing(_: Progress) -> None:
    """A share of the time, not of the samples, is what counts here."""
