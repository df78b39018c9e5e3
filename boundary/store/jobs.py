"""Calibration jobs: at most one an adapter, held by a process for as long as it renews its lease.

A job whose lease is over goes on as long as nobody has looked: its owner may renew it late. Once
it is marked `interrupted`, by `reap` or by the next job of the adapter, its owner is told JobLost.

A clock may be set. A process never gives up its own jobs, so one set forward costs it none; it takes
those of other processes on a machine for lost that have not renewed since. A lease that ends later than
any can is left from before the clock was set back, and begins anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast
from uuid import uuid4

from sqlalchemy import select, true
from sqlalchemy.ext.asyncio import AsyncSession

from boundary.record import BoundaryRecord
from boundary.store import audit, history
from boundary.store.database import StoreError, Write
from boundary.store.history import AdapterKey
from boundary.store.tables import JobRow

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
FinalState = Literal["succeeded", "failed", "cancelled"]

UNFINISHED = ("queued", "running")
REAPER = "system"
"""Who an interruption is laid to when nobody asked for it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One calibration of one adapter.

    request: what was asked for; JSON.
    stage, done, total: progress in whatever unit the stage has.
    owner: the process that runs it; nobody else may report on it or finish it.
    actor: who asked for it.
    lease_ends_at: after this, in the database's time, a job that is not finished counts as lost.
    """

    id: str
    adapter_name: str
    key: AdapterKey
    state: State
    request: Mapping[str, Any]
    stage: str | None
    done: int
    total: int
    boundary_id: str | None
    result: Mapping[str, Any] | None
    error: str | None
    owner: str
    actor: str
    is_cancel_requested: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    heartbeat_at: datetime
    lease_ends_at: datetime

    @property
    def is_finished(self) -> bool:
        """Nothing about this job will change any more."""
        return self.state not in UNFINISHED


class JobRunning(StoreError):
    """The adapter has a job already, whose owner lives."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"adapter {job.adapter_name!r} is being calibrated by job {job.id}")
        self.job = job


class JobLost(StoreError):
    """The job is not the caller's any more: finished, given up as interrupted, or another's."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id} is {job.state} and owned by {job.owner!r}")
        self.job = job


class NoSuchJob(StoreError):
    """No job has this id."""

    def __init__(self, id: str) -> None:
        super().__init__(f"there is no job {id!r}")


async def create(
    write: Write,
    adapter_name: str,
    key: AdapterKey,
    request: Mapping[str, Any],
    owner: str,
    actor: str,
    lease: timedelta,
) -> Job:
    """Queue a job; see `Store.create_job`."""
    query = select(JobRow).where(
        JobRow.base == key.base, JobRow.adapter == key.adapter, JobRow.state.in_(UNFINISHED)
    )
    holder = await write.session.scalar(query)
    if holder is not None:
        if write.now < holder.lease_ends_at:
            raise JobRunning(_job(holder))
        await _interrupt(write, holder, actor, _silent(holder))
    row = JobRow(
        id=uuid4().hex,
        adapter_name=adapter_name,
        base=key.base,
        adapter=key.adapter,
        state="queued",
        request=dict(request),
        done=0,
        total=0,
        owner=owner,
        actor=actor,
        is_cancel_requested=False,
        created_at=write.now,
        heartbeat_at=write.now,
        lease_ends_at=write.now + lease,
    )
    write.session.add(row)
    details = {"adapter_name": adapter_name, "adapter": key.adapter, "base": key.base}
    await _note(write, row, "job.create", actor, details)
    return _job(row)


async def start(write: Write, id: str, owner: str, lease: timedelta) -> Job:
    """Queued to running; see `Store.start_job`."""
    row = await _held(write, id, owner, ("queued",))
    row.state = "running"
    row.started_at = write.now
    _renew(write, row, lease)
    await _note(write, row, "job.start", row.actor, {})
    return _job(row)


async def report(
    write: Write, id: str, owner: str, stage: str, done: int, total: int, lease: timedelta
) -> Job:
    """Progress; see `Store.report`."""
    row = await _held(write, id, owner, ("running",))
    row.stage, row.done, row.total = stage, done, total
    _renew(write, row, lease)
    return _job(row)


async def heartbeat(write: Write, id: str, owner: str, lease: timedelta) -> Job:
    """A sign of life; see `Store.heartbeat`."""
    row = await _held(write, id, owner, UNFINISHED)
    _renew(write, row, lease)
    return _job(row)


async def finish(
    write: Write,
    id: str,
    owner: str,
    state: FinalState,
    record: BoundaryRecord | None,
    evidence: Mapping[str, Any],
    activate: bool,
    result: Mapping[str, Any] | None,
    error: str | None,
) -> Job:
    """The end, with everything that comes of it; see `Store.finish_job`."""
    if state not in ("succeeded", "failed", "cancelled"):
        raise ValueError(f"a job is not finished as {state!r}")
    if record is None and activate:
        raise ValueError("without a record there is nothing to activate")
    if record is not None and state != "succeeded":
        raise ValueError(f"a job that {state} has no record")
    row = await _held(write, id, owner, ("running",) if state == "succeeded" else UNFINISHED)
    key = AdapterKey(row.base, row.adapter)
    if record is not None and AdapterKey.of(record) != key:
        raise ValueError(f"the record was not made for the adapter of job {id}")
    if state == "succeeded" and row.is_cancel_requested:
        state, record, result = "cancelled", None, None
    if record is not None:
        boundary = await history.add(write, record, evidence, row.actor)
        row.boundary_id = boundary.id
        if activate:
            await history.activate(
                write,
                key,
                boundary.version,
                action="activate",
                actor=row.actor,
                reason=f"job {id}",
            )
    row.state = state
    row.result = None if result is None else dict(result)
    row.error = error
    row.finished_at = row.heartbeat_at = write.now
    details = {"boundary_id": row.boundary_id, "is_activated": record is not None and activate}
    await _note(write, row, f"job.{state}", row.actor, {**details, "error": error})
    return _job(row)


async def interrupt(write: Write, id: str, owner: str, reason: str) -> Job:
    """Given up by its owner; see `Store.interrupt_job`."""
    row = await _held(write, id, owner, UNFINISHED)
    await _interrupt(write, row, REAPER, reason)
    return _job(row)


async def request_cancel(write: Write, id: str, actor: str) -> Job:
    """Ask the owner to stop; see `Store.request_cancel`."""
    row = await _row(write.session, id)
    if row is None:
        raise NoSuchJob(id)
    if row.state in UNFINISHED and not row.is_cancel_requested:
        row.is_cancel_requested = True
        await _note(write, row, "job.request_cancel", actor, {})
    return _job(row)


async def reap(write: Write, lease: timedelta, but: str | None) -> list[Job]:
    """Give up what nobody holds; see `Store.reap`."""
    query = (
        select(JobRow)
        .where(JobRow.state.in_(UNFINISHED), JobRow.owner != but if but is not None else true())
        .order_by(JobRow.created_at, JobRow.id)
    )
    reaped = []
    for row in (await write.session.scalars(query)).all():
        if row.lease_ends_at <= write.now:
            await _interrupt(write, row, REAPER, _silent(row))
            reaped.append(_job(row))
        elif row.lease_ends_at > write.now + lease:
            row.lease_ends_at = write.now + lease
    return reaped


async def newest_first(session: AsyncSession, limit: int) -> list[Job]:
    """See `Store.jobs`."""
    query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
    return [_job(row) for row in await session.scalars(query)]


async def by_id(session: AsyncSession, id: str) -> Job | None:
    """See `Store.job`."""
    row = await _row(session, id)
    return None if row is None else _job(row)


async def _row(session: AsyncSession, id: str) -> JobRow | None:
    return await session.get(JobRow, id) if history.is_id(id) else None


async def _held(write: Write, id: str, owner: str, states: tuple[str, ...]) -> JobRow:
    """The owner's job in one of these states; nobody else can change it before the write ends."""
    row = await _row(write.session, id)
    if row is None:
        raise NoSuchJob(id)
    if row.owner != owner or row.state not in states:
        raise JobLost(_job(row))
    return row


def _renew(write: Write, row: JobRow, lease: timedelta) -> None:
    row.heartbeat_at = write.now
    row.lease_ends_at = write.now + lease


def _silent(row: JobRow) -> str:
    return f"its process {row.owner!r} gave no sign of life"


async def _interrupt(write: Write, row: JobRow, actor: str, reason: str) -> None:
    row.state = "interrupted"
    row.error = reason
    row.finished_at = write.now
    await _note(write, row, "job.interrupted", actor, {})


async def _note(
    write: Write, row: JobRow, action: str, actor: str, details: Mapping[str, Any]
) -> None:
    subject = f"job:{row.id}"
    details = {"owner": row.owner, **details}
    await audit.note(write, actor=actor, action=action, subject=subject, details=details)


def _job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        adapter_name=row.adapter_name,
        key=AdapterKey(row.base, row.adapter),
        state=cast(State, row.state),
        request=row.request,
        stage=row.stage,
        done=row.done,
        total=row.total,
        boundary_id=row.boundary_id,
        result=row.result,
        error=row.error,
        owner=row.owner,
        actor=row.actor,
        is_cancel_requested=row.is_cancel_requested,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        heartbeat_at=row.heartbeat_at,
        lease_ends_at=row.lease_ends_at,
    )
