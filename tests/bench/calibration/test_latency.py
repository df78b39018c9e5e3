"""Streams go on until the job has ended, only tokens of that time count, and a limit ends a job."""

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from boundary.selection import MIN_SAMPLES
from server.bench.calibration import latency
from server.bench.calibration.latency import (
    PERCENTS,
    CalibrationLatency,
    Gaps,
    Job,
    JobFacts,
    TimedEngine,
    Turn,
    measure_latency,
    seconds_of_own,
    stream_run,
)
from server.bench.calibration.served import JobOptions, serving
from server.bench.load import LoadResult, Timing
from server.bench.options import BenchOptions
from server.bench.plan import Plan
from server.config import ConfigError, Settings
from server.engine.async_engine import AsyncEngine
from server.errors import FathomError, GenerationError

LOAD = BenchOptions(
    random_model="2x32:vocab=100:positions=64",
    num_adapters=2,
    rank=2,
    concurrency=4,
    num_requests=8,
    prompt_len="4-9",
    output_len="40-50",  # most of the time a stream is between two tokens, whose gap feels a slice
)
JOB = JobOptions(adapter=None, num_samples=3, prompt_len=6, completion_len=3, limit_s=120.0, seed=0)
Serve = Callable[..., tuple[AsyncEngine, Plan, Job]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AsyncEngine, Plan, Job]]:
    settings = Settings.model_validate({"calibration_share": 0.5, "device": "cpu"})
    with serving(settings, LOAD, JOB, tmp_path_factory.mktemp("served")) as parts:
        yield parts


def measure(served: tuple[AsyncEngine, Plan, Job], **changes: Any) -> CalibrationLatency:
    engine, plan, job = served
    given: dict[str, Any] = {"limit_s": job.limit_s, "adapter": job.adapter} | changes
    job = Job(dataset=job.dataset, options=job.options, generation=job.generation, **given)
    return asyncio.run(
        measure_latency(
            engine, plan.workload, job, num_streams=4, repeat=2, progress=lambda *_: None
        )
    )


def test_a_job_ends_beside_streams_that_never_pause(
    served: tuple[AsyncEngine, Plan, Job],
) -> None:
    found = measure(served)
    assert found.is_finished
    assert found.errors == []
    assert found.alone.is_finished
    assert len(found.runs) == 2
    for run in found.runs:
        assert 0 < run.job.share < 1
        # Scores, lens and norms: before, after each slice, and the end.
        assert len(run.job.slice_s) >= 3
        assert run.num_requests >= 4
        for gaps in (run.quiet, run.calibrating):
            assert gaps.num > 0
            p50, p95, p99, longest = (gaps.by_percent[percent] for percent in PERCENTS)
            assert 0 < p50 <= p95 <= p99 <= longest


def test_a_slice_is_felt_in_its_own_turns_and_not_in_the_quiet_ones(
    served: tuple[AsyncEngine, Plan, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: were turns mixed up, quiet ones would see the slices too."""

    async def slow(timed: TimedEngine, _: Job) -> None:
        def slices() -> Generator[int, None, None]:
            for number in range(3):
                time.sleep(0.1)
                yield number

        await timed.run_slices(lambda _: slices(), lambda _: None)

    monkeypatch.setattr(latency, "_calibrate", slow)
    for run in measure(served).runs:
        assert run.calibrating.by_percent[100] >= 0.1
        assert run.quiet.by_percent[95] < 0.1
        assert run.job.share > 0.2


def test_a_job_that_does_not_end_is_given_up(
    served: tuple[AsyncEngine, Plan, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, _ = served

    async def endless(timed: TimedEngine, _: Job) -> None:
        def slices() -> Generator[int, None, None]:
            while True:
                yield 1

        await timed.run_slices(lambda _: slices(), lambda _: None)

    alone = JobFacts(1.0, True, (1.0,))

    async def told(*_: Any) -> JobFacts:
        return alone

    monkeypatch.setattr(latency, "_calibrate", endless)
    monkeypatch.setattr(latency, "_alone", told)
    found = measure(served, limit_s=0.2)
    assert not found.is_finished
    assert found.alone is alone
    for run in found.runs:
        assert not run.job.is_finished
        assert 0 < run.job.seconds <= 0.2
    assert engine.is_alive


def test_a_job_that_fails_says_why(served: tuple[AsyncEngine, Plan, Job]) -> None:
    with pytest.raises(FathomError, match="nobody"):
        measure(served, adapter="nobody")


def test_an_adapter_that_is_not_served_is_refused(tmp_path: Path) -> None:
    options = JobOptions("nobody", 3, 6, 3, 1.0, 0)
    settings = Settings.model_validate({"device": "cpu"})
    with (
        pytest.raises(ConfigError, match="no adapter 'nobody'; there are: a0, a1"),
        serving(settings, LOAD, options, tmp_path),
    ):
        pass


def test_the_demo_is_calibrated_with_its_own_samples(tmp_path: Path) -> None:
    load = BenchOptions(concurrency=2, num_requests=2, prompt_len="4", output_len="4")
    settings = Settings.model_validate({"device": "cpu"})
    options = JobOptions("pirate", MIN_SAMPLES, 6, 3, 1.0, 0)
    with serving(settings, load, options, tmp_path) as (_, plan, job):
        assert "pirate" in plan.served.adapters
        assert len(job.dataset.samples) == MIN_SAMPLES
        assert all(sample.completion for sample in job.dataset.samples)


def test_a_gap_belongs_to_the_turn_in_which_it_ended() -> None:
    timings = (
        Timing(0.0, [0.5, 1.5, 3.5, 4.0, 12.0], 12.0),
        Timing(0.0, [0.1, 0.2, 2.5, 9.5, 10.5], 10.5, error="cut"),
    )
    turns = [Turn(1.0, False), Turn(3.0, True), Turn(9.0, False)]
    job = JobFacts(3.0, True, (1.0,))
    run = stream_run(LoadResult(12.0, timings), turns, 10.0, job)
    # From 0.5 to 1.5, 0.2 to 2.5 and 2.5 to 9.5; before the first turn and after 10 nothing counts.
    assert run.calibrating == Gaps.of([1.0, 2.3, 7.0])
    assert run.quiet == Gaps.of([2.0, 0.5])
    assert run.quiet.by_percent == pytest.approx({50: 1.25, 95: 1.925, 99: 1.985, 100: 2.0})
    assert run.ratio(100) == 3.5
    assert run.errors == ("cut",)
    with pytest.raises(GenerationError, match="too short"):
        stream_run(LoadResult(12.0, timings), turns[:1], 10.0, job)
    assert CalibrationLatency(job, (run, run)).errors == ["cut"]


def test_quiet_turns_are_not_the_jobs_time() -> None:
    turns = [Turn(1.0, False), Turn(3.0, True), Turn(9.0, False)]
    assert seconds_of_own(turns, 10.0) == 3.0
    assert JobFacts(10.0, True, (0.5, 0.25)).share == 0.075
