"""Jobs: one an adapter, held by a lease, ended in one transaction; on both databases."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine

from boundary.store import database
from boundary.store.jobs import FinalState
from boundary.store.store import AdapterKey, Job, JobLost, JobRunning, NoSuchJob, Store
from tests.boundary.test_record import selected
from tests.boundary.test_store import ELSEWHERE, KEY, actions, pin

pytestmark = pytest.mark.anyio


async def create(store: Store, key: AdapterKey = KEY, owner: str = "host-1") -> Job:
    return await store.create_job("pirate", key, {"tolerance": 0.1}, owner=owner, actor="ada")


async def running(store: Store, key: AdapterKey = KEY, owner: str = "host-1") -> Job:
    job = await create(store, key, owner)
    return await store.start_job(job.id, owner)


@pytest.fixture
async def brief(store: Store, store_url: str) -> AsyncIterator[Store]:
    """A process whose leases are over before anybody looks."""
    opened = await Store.open(store_url, lease_s=1e-6)
    yield opened
    await opened.close()


async def test_a_job_from_beginning_to_end(store: Store, other: Store) -> None:
    job = await create(store)
    assert (job.state, job.key, job.adapter_name, job.actor) == ("queued", KEY, "pirate", "ada")
    assert (job.request, job.stage, job.done, job.total) == ({"tolerance": 0.1}, None, 0, 0)
    assert job.lease_ends_at - job.heartbeat_at == timedelta(seconds=10)
    assert await other.job(job.id) == job
    started = await store.start_job(job.id, "host-1")
    assert (started.state, started.started_at) == ("running", started.heartbeat_at)
    reported = await store.report(job.id, "host-1", stage="score", done=3, total=9)
    assert (reported.stage, reported.done, reported.total) == ("score", 3, 9)
    assert reported.lease_ends_at > started.lease_ends_at
    ended = await store.finish_job(
        job.id, "host-1", "succeeded", record=selected(), evidence={"controls": []},
        activate=True, result={"verdict": "improves"},
    )  # fmt: skip
    assert (ended.state, ended.result, ended.error) == ("succeeded", {"verdict": "improves"}, None)
    assert ended.is_finished
    assert ended.finished_at is not None
    active = await other.active(KEY)
    assert active is not None
    assert (active.id, active.version, active.actor) == (ended.boundary_id, 1, "ada")
    assert active.evidence == {"controls": []}
    (activation,) = await other.active_since(0)
    assert (activation.reason, activation.at) == (f"job {job.id}", ended.finished_at)
    assert await other.job(job.id) == ended
    assert await actions(store) == [
        "job.create", "job.start", "boundary.add", "boundary.activate", "job.succeeded",
    ]  # fmt: skip


async def test_a_record_may_be_kept_without_being_activated(store: Store) -> None:
    job = await running(store)
    ended = await store.finish_job(job.id, "host-1", "succeeded", record=selected())
    assert [kept.id for kept in await store.history(KEY)] == [ended.boundary_id]
    assert await store.active(KEY) is None


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_a_queued_or_running_job_may_end_without_a_record(
    store: Store, state: FinalState
) -> None:
    for job in (await create(store), await running(store, ELSEWHERE)):
        ended = await store.finish_job(job.id, "host-1", state, error="line 3 is empty")
        assert (ended.state, ended.error, ended.boundary_id) == (state, "line 3 is empty", None)
    assert await store.active_since(0) == []


async def test_only_a_running_job_succeeds_and_only_once(store: Store) -> None:
    job = await create(store)
    with pytest.raises(JobLost, match="queued"):
        await store.finish_job(job.id, "host-1", "succeeded", record=selected())
    await store.start_job(job.id, "host-1")
    with pytest.raises(JobLost, match="running"):
        await store.start_job(job.id, "host-1")
    await store.finish_job(job.id, "host-1", "succeeded", record=selected())
    with pytest.raises(JobLost, match="succeeded") as caught:
        await store.finish_job(job.id, "host-1", "failed")
    assert caught.value.job.state == "succeeded"
    assert len(await store.history(KEY)) == 1


async def test_a_second_job_of_an_adapter_is_refused_with_the_first(
    store: Store, other: Store
) -> None:
    job = await create(store)
    for _ in range(2):
        with pytest.raises(JobRunning, match=job.id) as caught:
            await create(other, owner="host-2")
        assert caught.value.job == await store.job(job.id)
        await store.heartbeat(job.id, "host-1")
    assert (await create(other, ELSEWHERE, owner="host-2")).state == "queued"
    await store.finish_job(job.id, "host-1", "failed")
    assert (await create(other, owner="host-2")).state == "queued"


async def test_of_many_who_ask_at_once_one_gets_the_job(store: Store, other: Store) -> None:
    asking = (create(each) for _ in range(6) for each in (store, other))
    answers = await asyncio.gather(*asking, return_exceptions=True)
    (job,) = [answer for answer in answers if isinstance(answer, Job)]
    refused = [answer for answer in answers if isinstance(answer, JobRunning)]
    assert len(refused) == 11
    assert all(answer.job.id == job.id for answer in refused)
    assert await store.jobs() == [job]


async def test_the_database_itself_allows_one_unfinished_job(store: Store, store_url: str) -> None:
    job = await create(store)
    url = store_url.replace("sqlite:", "sqlite+aiosqlite:").replace("sql:", "sql+psycopg:")
    engine = create_async_engine(url)
    names = "adapter_name, base, adapter, request, done, total, owner, actor, is_cancel_requested"
    columns = f"{names}, created_at, heartbeat_at, lease_ends_at"
    copy = f"INSERT INTO jobs (id, state, {columns}) SELECT :id, :state, {columns} FROM jobs"
    try:
        with pytest.raises(IntegrityError):
            async with engine.begin() as connection:
                await connection.execute(text(copy), {"id": "1" * 32, "state": "running"})
        with pytest.raises(IntegrityError):
            async with engine.begin() as connection:
                await connection.execute(text(copy), {"id": "2" * 32, "state": "sleeping"})
        async with engine.begin() as connection:
            await connection.execute(text(copy), {"id": "3" * 32, "state": "failed"})
    finally:
        await engine.dispose()
    assert {found.id for found in await store.jobs()} == {job.id, "3" * 32}


async def test_only_the_owner_has_a_say(store: Store) -> None:
    job = await running(store)
    with pytest.raises(JobLost, match="host-1"):
        await store.report(job.id, "host-2", stage="score", done=1, total=2)
    with pytest.raises(JobLost, match="host-1"):
        await store.heartbeat(job.id, "host-2")
    with pytest.raises(JobLost, match="host-1"):
        await store.finish_job(job.id, "host-2", "failed")
    assert await store.job(job.id) == job


async def test_a_job_that_never_was_is_said_so(store: Store) -> None:
    for id in ("0" * 32, "\x00"):
        assert await store.job(id) is None
        with pytest.raises(NoSuchJob, match="there is no job"):
            await store.start_job(id, "host-1")
        with pytest.raises(NoSuchJob, match="there is no job"):
            await store.request_cancel(id, "ada")


async def test_progress_is_reported_by_running_jobs_only(store: Store) -> None:
    job = await create(store)
    with pytest.raises(JobLost, match="queued"):
        await store.report(job.id, "host-1", stage="score", done=1, total=2)
    renewed = await store.heartbeat(job.id, "host-1")
    assert renewed.lease_ends_at > job.lease_ends_at


async def test_a_request_to_cancel_reaches_the_owner_once(store: Store, other: Store) -> None:
    job = await running(store)
    for _ in range(2):
        assert (await other.request_cancel(job.id, "bob")).is_cancel_requested
    assert (
        await store.report(job.id, "host-1", stage="score", done=1, total=2)
    ).is_cancel_requested
    ended = await store.finish_job(job.id, "host-1", "cancelled")
    assert await other.request_cancel(job.id, "bob") == ended
    trail = [(entry.actor, entry.action) for entry in reversed(await store.audit())]
    assert trail[2:] == [("bob", "job.request_cancel"), ("ada", "job.cancelled")]


async def test_a_cancellation_that_came_first_wins_over_success(store: Store) -> None:
    job = await running(store)
    await store.request_cancel(job.id, "bob")
    ended = await store.finish_job(
        job.id, "host-1", "succeeded", record=selected(), activate=True, result={"depth": 2}
    )
    assert (ended.state, ended.boundary_id, ended.result) == ("cancelled", None, None)
    assert await store.history(KEY) == []
    assert await store.active(KEY) is None


async def test_reaping_spares_the_living(store: Store, brief: Store) -> None:
    alive, dead = await running(store), await running(brief, ELSEWHERE, owner="host-2")
    (reaped,) = await store.reap()
    assert (reaped.id, reaped.state) == (dead.id, "interrupted")
    assert reaped.error == "its process 'host-2' gave no sign of life"
    assert reaped.finished_at is not None
    assert reaped.finished_at >= dead.lease_ends_at
    assert await store.reap() == []
    assert [found.state for found in await store.jobs()] == ["interrupted", "running"]
    assert await store.job(alive.id) == alive
    newest = (await store.audit(1))[0]
    assert (newest.actor, newest.action) == ("system", "job.interrupted")


@pytest.mark.parametrize("is_spared", [True, False])
async def test_a_process_spares_its_own_jobs_when_a_clock_is_set_forward(
    store: Store, brief: Store, is_spared: bool
) -> None:
    """The control does not say who it is, and gives up what it is about to renew."""
    job = await running(brief)
    reaped = await store.reap(but="host-1" if is_spared else None)
    assert [each.id for each in reaped] == ([] if is_spared else [job.id])


async def test_a_lease_from_before_the_clock_was_set_back_begins_anew(
    store: Store, store_url: str
) -> None:
    long = await Store.open(store_url, lease_s=7200)  # as one of 10 s does, two hours ago
    try:
        job = await running(long)
    finally:
        await long.close()
    assert await store.reap() == []
    found = await store.job(job.id)
    assert found is not None
    assert found.state == "running"
    assert found.lease_ends_at - found.heartbeat_at < timedelta(seconds=60)


async def test_a_new_job_takes_the_place_of_a_dead_one(store: Store, brief: Store) -> None:
    for dead in (await create(brief, owner="host-2"), await running(brief, ELSEWHERE, "host-2")):
        job = await create(store, dead.key)
        found = await store.job(dead.id)
        assert found is not None
        assert (found.state, job.state) == ("interrupted", "queued")


async def test_an_interrupted_owner_is_told_and_changes_nothing(store: Store, brief: Store) -> None:
    job = await running(brief)
    await store.reap()
    before = await store.audit()
    for attempt in (
        brief.report(job.id, "host-1", stage="score", done=1, total=2),
        brief.heartbeat(job.id, "host-1"),
        brief.finish_job(job.id, "host-1", "succeeded", record=selected(), activate=True),
    ):
        with pytest.raises(JobLost, match="interrupted"):
            await attempt
    assert await store.history(KEY) == []
    assert await store.active(KEY) is None
    assert await store.audit() == before


async def test_an_owner_that_cannot_go_on_gives_its_job_up(store: Store, other: Store) -> None:
    for job in (await create(store), await running(store, ELSEWHERE)):
        with pytest.raises(JobLost, match="host-1"):
            await other.interrupt_job(job.id, "host-2", reason="no business of mine")
        ended = await store.interrupt_job(job.id, "host-1", reason="its server stopped")
        assert (ended.state, ended.error) == ("interrupted", "its server stopped")
        assert ended.is_finished
        with pytest.raises(JobLost, match="interrupted"):
            await store.interrupt_job(job.id, "host-1", reason="twice")
        assert (await create(other, job.key, owner="host-2")).state == "queued"
    (newest,) = [e for e in await store.audit() if e.action == "job.interrupted"][:1]
    assert newest.actor == "system"


async def test_a_late_sign_of_life_is_one(store: Store, other: Store, brief: Store) -> None:
    job = await running(brief)
    await other.heartbeat(job.id, "host-1")
    assert await store.reap() == []
    with pytest.raises(JobRunning):
        await create(store, owner="host-2")


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ({"state": "interrupted"}, "not finished as"),
        ({"state": "succeeded", "activate": True}, "nothing to activate"),
        ({"state": "failed", "record": pin()}, "has no record"),
        ({"state": "succeeded", "record": pin(key=ELSEWHERE)}, "not made for the adapter"),
    ],
)
async def test_a_wrong_end_is_refused(store: Store, named: dict[str, object], why: str) -> None:
    job = await running(store)
    with pytest.raises(ValueError, match=why):
        await store.finish_job(job.id, "host-1", **named)  # type: ignore[arg-type]
    assert await store.job(job.id) == job


async def test_the_newest_jobs_come_first(store: Store) -> None:
    made = []
    for _ in range(3):
        made.append((await create(store)).id)
        await store.finish_job(made[-1], "host-1", "failed")
    assert [job.id for job in await store.jobs()] == made[::-1]
    assert [job.id for job in await store.jobs(limit=1)] == made[2:]


@pytest.mark.parametrize("lease_s", [0, -1, float("nan"), float("inf")])
async def test_a_lease_has_a_length(store_url: str, lease_s: float) -> None:
    with pytest.raises(ValueError, match="lease_s"):
        await Store.open(store_url, lease_s=lease_s)


class WrongClock(datetime):
    """A host whose clock is a day ahead."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return datetime.now(UTC) + timedelta(days=1)


async def test_a_host_with_a_wrong_clock_breaks_no_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    job = await running(store)
    monkeypatch.setattr(database, "datetime", WrongClock)
    is_postgres = "postgresql" in request.node.name
    # SQLite's file is one machine's, and so is its clock: there the control fails.
    reaped = await store.reap()
    assert (reaped == []) == is_postgres
    monkeypatch.undo()
    found = await store.job(job.id)
    assert found is not None
    assert found.is_finished != is_postgres
