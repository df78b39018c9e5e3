"""Jobs of one process: one at a time, seen from anywhere, and ended one way with all or nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from boundary.store.store import Job, JobRunning, Store
from server.calibration import jobs as jobs_module
from server.calibration.boundaries import Boundaries
from server.calibration.jobs import JobManager
from server.errors import Draining, GenerationError
from tests.api.fake_engine import NUM_LAYERS, FakeEngine
from tests.calibration.findings import DEPTH, Work, found, plan
from tests.calibration.test_boundaries import TUNED, Failing, adapter, depth_of, pinned

pytestmark = pytest.mark.anyio

LIMIT_S = 60


@pytest.fixture
def boundaries(engine: FakeEngine, store: Store) -> Boundaries:
    return Boundaries(engine, store)


@pytest.fixture
async def manager(
    engine: FakeEngine, store: Store, boundaries: Boundaries
) -> AsyncIterator[JobManager]:
    engine.calibrations = {}
    manager = JobManager(engine, store, boundaries)
    yield manager
    await manager.stop()


async def ended(manager: JobManager, job: Job) -> Job:
    """The job when it is finished."""
    async with asyncio.timeout(LIMIT_S), contextlib.aclosing(manager.watch(job.id)) as news:
        *_, job = [seen async for seen in news]
    assert job.is_finished
    return job


async def test_what_improves_is_kept_and_in_force_when_the_end_is_told(
    engine: FakeEngine, manager: JobManager, store: Store
) -> None:
    engine.slices = Work()
    job = await manager.start(plan(adapter(engine)), "admin:1")
    assert (job.state, job.adapter_name, job.request) == ("queued", "tuned", {"seed": 0})
    end = await ended(manager, job)
    assert (depth_of(engine, "tuned"), end.state) == ((DEPTH, 1), "succeeded")
    assert end.result is not None
    assert (end.result["verdict"], end.result["depth"]) == ("improves", DEPTH)
    assert (end.result["is_activated"], end.result["num_samples"]) == (True, 40)
    assert (end.stage, end.done, end.total) == ("outputs", 3, 3)
    kept = await store.active(TUNED)
    assert kept is not None
    assert (kept.id, kept.actor) == (end.boundary_id, "admin:1")
    assert kept.evidence["verdict"] == "improves"
    assert len(kept.evidence["outputs"]) == 1
    assert await manager.job(job.id) == end
    assert (await manager.jobs(5)) == [end]


async def test_whoever_watches_sees_progress_and_then_the_end(
    engine: FakeEngine, manager: JobManager
) -> None:
    engine.slices = work = Work(is_held=True)
    job = await manager.start(plan(adapter(engine)), "admin:1")
    seen = []
    async with asyncio.timeout(LIMIT_S), contextlib.aclosing(manager.watch(job.id)) as news:
        async for job in news:
            seen.append((job.state, job.stage, job.done))
            if seen[-1] == ("running", "score", 4):
                work.may_end.set()
    assert seen[-1][0] == "succeeded"
    assert ("running", "score", 4) in seen
    assert len(seen) == len(set(seen))


async def test_progress_and_a_cancellation_cross_processes(
    engine: FakeEngine, manager: JobManager, other: Store
) -> None:
    engine.slices = work = Work(is_held=True)
    job = await manager.start(plan(adapter(engine)), "admin:1")
    elsewhere = JobManager(engine, other, Boundaries(engine, other))
    async with asyncio.timeout(LIMIT_S), contextlib.aclosing(elsewhere.watch(job.id)) as news:
        async for job in news:
            if (job.stage, job.done) == ("score", 4) and not job.is_cancel_requested:
                assert (await elsewhere.cancel(job.id, "admin:2")).is_cancel_requested
    assert job.state == "cancelled"
    assert work.num_cancelled == 1
    assert await other.history(TUNED) == []
    assert depth_of(engine, "tuned") is None


async def test_one_job_an_adapter_and_one_at_a_time(
    engine: FakeEngine, manager: JobManager, store: Store
) -> None:
    engine.slices = work = Work(is_held=True)
    first = await manager.start(plan(adapter(engine)), "admin:1")
    await work.began.wait()
    with pytest.raises(JobRunning, match=first.id):
        await manager.start(plan(adapter(engine)), "admin:2")
    second = await manager.start(plan(adapter(engine, "plain")), "admin:3")
    waiting = await store.job(second.id)
    assert waiting is not None
    lease = waiting.lease_ends_at
    async with asyncio.timeout(LIMIT_S):
        while (waiting := await store.job(second.id)) is not None:
            if waiting.lease_ends_at > lease:
                break
            await asyncio.sleep(0.001)
    assert waiting is not None
    assert waiting.state == "queued", "it waits, and keeps its lease"
    work.may_end.set()
    assert [(await ended(manager, job)).state for job in (first, second)] == ["succeeded"] * 2
    assert work.most == 1
    assert (await manager.start(plan(adapter(engine)), "admin:4")).state == "queued"


async def test_a_queued_job_is_cancelled_before_it_begins(
    engine: FakeEngine, manager: JobManager
) -> None:
    engine.slices = work = Work(is_held=True)
    first = await manager.start(plan(adapter(engine)), "admin:1")
    await work.began.wait()
    second = await manager.start(plan(adapter(engine, "plain")), "admin:1")
    await manager.cancel(second.id, "admin:1")
    end = await ended(manager, second)
    assert (end.state, end.started_at) == ("cancelled", None)
    work.may_end.set()
    assert (await ended(manager, first)).state == "succeeded"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("the score of sample 3 is nan\x00"), "the score of sample 3 is nan\ufffd"),
        (GenerationError("out of memory"), "out of memory"),
        (RuntimeError("secret"), "internal error; the server's log has the rest"),
    ],
)
async def test_a_calibration_that_fails_keeps_nothing_but_its_reason(
    engine: FakeEngine, manager: JobManager, store: Store, error: Exception, told: str
) -> None:
    engine.slices = Work(error)
    end = await ended(manager, await manager.start(plan(adapter(engine)), "admin:1"))
    assert (end.state, end.error, end.result) == ("failed", told, None)
    assert await store.history(TUNED) == []
    assert depth_of(engine, "tuned") is None


async def test_keep_full_is_kept_and_leaves_an_older_depth_active(
    engine: FakeEngine, manager: JobManager, store: Store
) -> None:
    await store.pin(pinned(4), actor="ada")
    engine.slices = Work(found(NUM_LAYERS))
    end = await ended(manager, await manager.start(plan(adapter(engine)), "admin:1"))
    assert end.state == "succeeded"
    assert end.result is not None
    assert (end.result["verdict"], end.result["is_activated"]) == ("keep_full", False)
    assert [kept.record.verdict for kept in await store.history(TUNED)] == ["keep_full", None]
    active = await store.active(TUNED)
    assert active is not None
    assert active.version == 1


@pytest.mark.parametrize("is_dry_run", [True, False])
async def test_what_must_not_be_activated_is_not(
    engine: FakeEngine, manager: JobManager, store: Store, is_dry_run: bool
) -> None:
    engine.slices = Work()
    wish = plan(adapter(engine), activate=is_dry_run, is_dry_run=is_dry_run)
    end = await ended(manager, await manager.start(wish, "admin:1"))
    assert end.result is not None
    assert (end.state, end.result["depth"]) == ("succeeded", DEPTH)
    assert not end.result["is_activated"]
    assert await store.active(TUNED) is None
    assert depth_of(engine, "tuned") is None
    history = await store.history(TUNED)
    if is_dry_run:
        assert history == []
        assert end.result["record"]["depth"] == DEPTH
        assert end.result["evidence"]["depth"] == DEPTH
    else:
        assert [kept.record.depth for kept in history] == [DEPTH]


async def test_too_few_samples_say_how_many_are_needed(
    engine: FakeEngine, manager: JobManager, store: Store
) -> None:
    engine.slices = Work(found(num_samples=10))
    for is_dry_run, state in ((False, "failed"), (True, "succeeded")):
        wish = plan(adapter(engine), is_dry_run=is_dry_run, num_samples=10)
        end = await ended(manager, await manager.start(wish, "admin:1"))
        assert end.state == state
        assert end.result is not None
        assert end.result["verdict"] == "too_few"
        assert end.result["num_samples_needed"] >= 32
        assert "10 samples are too few" in end.result["verdict_in_words"]
        assert (end.error is not None) == (state == "failed")
    assert await store.history(TUNED) == []


async def test_a_server_that_stops_interrupts_its_jobs(
    engine: FakeEngine, manager: JobManager, store: Store
) -> None:
    engine.slices = work = Work(is_held=True)
    running = await manager.start(plan(adapter(engine)), "admin:1")
    await work.began.wait()
    queued = await manager.start(plan(adapter(engine, "plain")), "admin:1")
    await manager.stop()
    for job in (running, queued):
        end = await store.job(job.id)
        assert end is not None
        assert (end.state, end.error) == ("interrupted", "its server was stopped")
    assert (work.num_cancelled, work.num_running) == (1, 0)
    assert await store.history(TUNED) == []


async def test_a_job_whose_engine_drains_is_interrupted_and_has_not_failed(
    engine: FakeEngine, manager: JobManager, store: Store
) -> None:
    engine.slices = Work(Draining("the server is stopping"))
    end = await ended(manager, await manager.start(plan(adapter(engine)), "admin:1"))
    assert (end.state, end.error) == ("interrupted", "its server was stopped")


async def test_a_job_that_another_process_gave_up_stops(
    engine: FakeEngine, store: Store, store_url: str
) -> None:
    brief = await Store.open(store_url, lease_s=1e-6)
    manager = JobManager(engine, brief, Boundaries(engine, brief))
    engine.slices = work = Work(is_held=True)
    job = await manager.start(plan(adapter(engine)), "admin:1")
    await work.began.wait()
    stop = asyncio.Event()
    # The other process: one's own jobs are never given up by oneself.
    assert len(await brief.reap()) == 1
    tending = asyncio.create_task(manager.tend(stop))
    end = await ended(manager, job)
    assert end.state == "interrupted"
    assert "no sign of life" in (end.error or "")
    async with asyncio.timeout(LIMIT_S):
        while work.num_running:
            await asyncio.sleep(0.001)
    assert work.num_cancelled == 1
    stop.set()
    await tending
    await manager.stop()
    await brief.close()
    assert await store.history(TUNED) == []


async def test_a_store_that_goes_away_for_a_while_loses_no_job(
    engine: FakeEngine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(store)
    manager = JobManager(
        engine,
        failing,  # type: ignore[arg-type]
        Boundaries(engine, failing),  # type: ignore[arg-type]
    )
    engine.slices = work = Work(is_held=True)
    job = await manager.start(plan(adapter(engine)), "admin:1")
    async with asyncio.timeout(LIMIT_S):
        await work.began.wait()
        failing.is_down = True
        for num_failures in (3, 6):  # first its progress is not kept, then its end
            while failing.num_failures < num_failures:
                await asyncio.sleep(0.001)
            work.may_end.set()
    assert (await manager.job(job.id)).state == "running"
    failing.is_down = False
    assert (await ended(manager, job)).state == "succeeded"
    assert depth_of(engine, "tuned") == (DEPTH, 1)


async def test_a_job_of_a_dead_process_is_given_up(
    engine: FakeEngine, manager: JobManager, store: Store, store_url: str
) -> None:
    brief = await Store.open(store_url, lease_s=1e-6)
    dead = await brief.create_job("tuned", TUNED, {}, owner="nobody", actor="ada")
    await brief.close()
    stop = asyncio.Event()
    tending = asyncio.create_task(manager.tend(stop))
    assert (await ended(manager, dead)).state == "interrupted"
    stop.set()
    await tending


async def test_a_still_job_is_told_again_so_that_no_proxy_gives_up(
    engine: FakeEngine, manager: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "STILL_S", 0.01)
    engine.slices = work = Work(is_held=True)
    job = await manager.start(plan(adapter(engine)), "admin:1")
    await work.began.wait()
    num_told = 0
    async with asyncio.timeout(LIMIT_S), contextlib.aclosing(manager.watch(job.id)) as news:
        async for told in news:
            num_told += (told.stage, told.done) == ("score", 4) and not told.is_finished
            if num_told == 3:
                work.may_end.set()
    assert num_told >= 3


async def test_watching_ends_with_the_server(engine: FakeEngine, manager: JobManager) -> None:
    engine.slices = work = Work(is_held=True)
    job = await manager.start(plan(adapter(engine)), "admin:1")
    await work.began.wait()
    async with (
        asyncio.timeout(LIMIT_S),
        contextlib.aclosing(manager.watch(job.id, is_stopping=lambda: True)) as news,
    ):
        states = [told.state async for told in news]
    assert len(states) == 1
