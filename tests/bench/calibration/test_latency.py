"""Streams go on until the job has ended, only tokens of that time count, and a limit ends a job."""

import asyncio
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from boundary.selection import MIN_SAMPLES
from server.bench.calibration import latency
from server.bench.calibration.latency import (
    CalibrationLatency,
    Job,
    JobFacts,
    Pair,
    StreamRun,
    TimedEngine,
    measure_latency,
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
    output_len="4-9",
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
    assert len(found.pairs) == 2
    assert found.alone.is_finished
    for pair in found.pairs:
        job = pair.calibrating.job
        assert job is not None
        assert 0 < job.share < 1
        # Scores, lens and norms: before, after each slice, and the end.
        assert len(job.slice_s) >= 3
        assert pair.quiet.job is None
        assert pair.calibrating.num_requests >= 4
        assert pair.calibrating.num_gaps > 0
        gaps = pair.calibrating.gap_s
        assert 0 < gaps[50] <= gaps[95] <= gaps[99] <= gaps[100]


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
    for pair in found.pairs:
        assert pair.calibrating.job is not None
        assert not pair.calibrating.job.is_finished
        assert pair.calibrating.job.seconds == 0.2
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


def test_gaps_that_ended_too_late_do_not_count() -> None:
    timings = (
        Timing(0.0, [1.0, 2.0, 4.0, 8.0], 8.0),
        Timing(0.0, [3.0, 3.5, 9.0], 9.0, error="cut"),
    )
    run = stream_run(LoadResult(9.0, timings), 4.0)
    assert run.num_gaps == 3
    assert run.gap_s == {50: 1.0, 95: pytest.approx(1.9), 99: pytest.approx(1.98), 100: 2.0}
    assert run.errors == ("cut",)
    assert stream_run(LoadResult(9.0, timings), 9.0).gap_s[100] == 5.5
    with pytest.raises(GenerationError, match=r"no stream got two tokens in 1\.5 s; cut"):
        stream_run(LoadResult(9.0, timings), 1.5)


def test_ratios_and_shares() -> None:
    job = JobFacts(10.0, True, (0.5, 0.25))
    slow = StreamRun(1, 1, {50: 2.0, 95: 3.0}, (), job)
    fast = StreamRun(1, 1, {50: 1.0, 95: 2.0}, ("late",))
    pair = Pair(slow, fast)
    assert (pair.ratio(50), pair.ratio(95)) == (2.0, 1.5)
    assert job.share == 0.075
    assert CalibrationLatency(job, (pair,)).errors == ["late"]
