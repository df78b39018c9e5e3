"""Time between the tokens of steady streams, with and without a calibration beside them.

One engine in this process and so many streams that never pause: as one ends, the next begins. The job
is the server's own pipeline. After each slice, and the pause that the engine makes for it, the job is
held back for as long as both took: calibrating and quiet turns alternate within seconds, under one
load and the same noise of the machine.
"""

import asyncio
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from typing import Any, cast

from boundary.dataset import Dataset
from boundary.options import CalibrationOptions
from boundary.progress import Progress
from server.bench.in_process import EngineClient
from server.bench.load import LoadResult, drive
from server.bench.measure import percentile
from server.bench.workload import WorkItem, Workload
from server.calibration.generation import GenerationOptions
from server.calibration.outcome import Outcome
from server.calibration.pipeline import calibrate
from server.engine.async_engine import AsyncEngine
from server.engine.protocol import Engine, MakeSlices, SliceHost, Slices
from server.errors import GenerationError
from server.loading import ReportProgress

PERCENTS = (50, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class Job:
    """What is calibrated, again and again; `limit_s` counts the quiet turns too."""

    adapter: str
    dataset: Dataset
    options: CalibrationOptions
    generation: GenerationOptions
    limit_s: float


@dataclass(frozen=True, slots=True)
class JobFacts:
    """One calibration.

    seconds: of its own turns.
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
class Gaps:
    """Seconds between the tokens of a stream, over all streams: how many there were, by percent."""

    num: int
    by_percent: Mapping[int, float]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Gaps":
        """Raises GenerationError where there are none."""
        found = {percent: percentile(seconds, percent) for percent in PERCENTS}
        known = {percent: value for percent, value in found.items() if value is not None}
        if not known:
            raise GenerationError("the run was too short: no stream gained two tokens in a turn")
        return cls(len(seconds), known)


@dataclass(frozen=True, slots=True)
class StreamRun:
    """One job from its start to its end, and the streams meanwhile."""

    quiet: Gaps
    calibrating: Gaps
    job: JobFacts
    num_requests: int
    errors: tuple[str, ...]

    def ratio(self, percent: int) -> float:
        """How many times as long as in the quiet turns."""
        return self.calibrating.by_percent[percent] / self.quiet.by_percent[percent]


@dataclass(frozen=True, slots=True)
class CalibrationLatency:
    """What was found. alone: the same job on an idle engine."""

    alone: JobFacts
    runs: tuple[StreamRun, ...]

    @property
    def is_finished(self) -> bool:
        """Whether every job ended within its limit."""
        return all(run.job.is_finished for run in self.runs)

    @property
    def errors(self) -> list[str]:
        """What requests failed with, each once."""
        return sorted({error for run in self.runs for error in run.errors})


async def measure_latency(
    engine: AsyncEngine,
    workload: Workload,
    job: Job,
    *,
    num_streams: int,
    repeat: int,
    progress: ReportProgress,
) -> CalibrationLatency:
    """The job alone, a warm-up of the streams, then the job beside them, again and again."""
    items = _endless(workload)
    client = EngineClient(engine)
    progress("jobs", 0, 1 + repeat)
    alone = await _alone(engine, job)
    await drive(client, list(islice(items, num_streams)), num_streams)
    runs = []
    for done in range(1, 1 + repeat):
        progress("jobs", done, 1 + repeat)
        runs.append(await _beside(engine, client, items, job, num_streams))
    progress("jobs", 1 + repeat, 1 + repeat)
    return CalibrationLatency(alone, tuple(runs))


@dataclass(frozen=True, slots=True)
class Turn:
    """From `start_s` on, to the next turn."""

    start_s: float
    is_quiet: bool


@dataclass(slots=True)
class TimedEngine:
    """An engine that times its slices and holds them back in turns, but otherwise the engine."""

    engine: AsyncEngine
    has_quiet_turns: bool
    slice_s: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

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
                self.turns.append(Turn(began, is_quiet=False))
                try:
                    progress = next(slices)
                except StopIteration as end:
                    return end.value
                finally:
                    self.slice_s.append(time.perf_counter() - began)
                yield progress  # comes back once the slice has been paid for by its pause
                now = time.perf_counter()
                if self.has_quiet_turns:
                    self.turns.append(Turn(now, is_quiet=True))
                    while time.perf_counter() < now + (now - began):
                        yield progress
        finally:
            slices.close()


def stream_run(
    result: LoadResult, turns: Sequence[Turn], ended_s: float, job: JobFacts
) -> StreamRun:
    """Each gap belongs to the turn in which it ended: a slice begins its turn, and delays that token.

    turns, ended_s: in seconds after the run's start. What came before the first turn or after
    `ended_s` does not count. Raises GenerationError where a kind of turn saw no gap.
    """
    starts = [turn.start_s for turn in turns]
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for timing in result.timings:
        for earlier, later in pairwise(timing.piece_s):
            index = bisect(starts, later) - 1
            if index >= 0 and later <= ended_s:
                gaps[turns[index].is_quiet].append(later - earlier)
    return StreamRun(
        quiet=Gaps.of(gaps[True]),
        calibrating=Gaps.of(gaps[False]),
        job=job,
        num_requests=len(result.timings),
        errors=tuple(sorted({t.error for t in result.timings if t.error is not None})),
    )


def seconds_of_own(turns: Sequence[Turn], ended_s: float) -> float:
    """How long the turns that are not quiet took together."""
    ends = [*(turn.start_s for turn in turns[1:]), ended_s]
    return sum(
        end - turn.start_s for turn, end in zip(turns, ends, strict=True) if not turn.is_quiet
    )


async def _alone(engine: AsyncEngine, job: Job) -> JobFacts:
    timed = TimedEngine(engine, has_quiet_turns=False)
    began = time.perf_counter()
    await _calibrate(timed, job)
    return JobFacts(time.perf_counter() - began, True, tuple(timed.slice_s))


async def _beside(
    engine: AsyncEngine,
    client: EngineClient,
    items: Iterator[WorkItem],
    job: Job,
    num_streams: int,
) -> StreamRun:
    timed = TimedEngine(engine, has_quiet_turns=True)
    began = time.perf_counter()
    ended: list[float] = []
    task = asyncio.ensure_future(_calibrate(timed, job))
    task.add_done_callback(lambda _: ended.append(time.perf_counter() - began))

    def wanted() -> Iterator[WorkItem]:
        while not task.done() and time.perf_counter() - began < job.limit_s:
            yield next(items)

    try:
        result = await drive(client, wanted(), num_streams)
        is_finished = task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()  # raises what the job did
    ended_s = min(ended[0], job.limit_s)
    turns = [
        Turn(turn.start_s - began, turn.is_quiet)
        for turn in timed.turns
        if turn.start_s - began < ended_s
    ]
    own_s = seconds_of_own(turns, ended_s)
    facts = JobFacts(own_s, is_finished, tuple(timed.slice_s))
    return stream_run(result, turns, ended_s, facts)


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


def _nothing(_: Progress) -> None:
    """How far a job has come is not what is measured."""
