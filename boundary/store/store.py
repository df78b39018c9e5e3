"""The store of calibration: records, which of them is active, jobs and the audit trail.

One object over one database, SQLite or PostgreSQL, which many processes may open at once. It knows
no model and runs no job; the server and `fathom calibrate` call it from an event loop.

Every method is one transaction: done wholly or not at all, also when the process is killed in it.
Whatever changes something writes its audit entry in the same transaction. All times are UTC.
Everything may raise StoreError; misuse that no user can cause is a ValueError.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

from boundary.record import BoundaryRecord
from boundary.store import audit, history, jobs
from boundary.store.audit import AuditEntry, Column, Outcome
from boundary.store.database import Database, StoreError
from boundary.store.history import (
    Action,
    Activation,
    AdapterKey,
    NoSuchVersion,
    StoredBoundary,
    UnreadableRecord,
)
from boundary.store.jobs import FinalState, Job, JobLost, JobRunning, NoSuchJob

__all__ = [
    "Activation",
    "AdapterKey",
    "AuditEntry",
    "Job",
    "JobLost",
    "JobRunning",
    "NoSuchJob",
    "NoSuchVersion",
    "Store",
    "StoreError",
    "StoredBoundary",
    "UnreadableRecord",
]

MAX_LEASE_S = 86_400.0


class Store:
    """Records, activations, jobs and audit of one database; made by `open`."""

    def __init__(self, database: Database, lease: timedelta) -> None:
        self._database = database
        self._lease = lease

    @classmethod
    async def open(cls, url: str, *, lease_s: float = 10.0) -> Self:
        """Open a database and bring its tables up to date, whoever else is doing the same.

        url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user@host/name`.
        lease_s: how long a job of this process counts as alive after its last sign of life.

        Raises StoreError if it cannot be reached, its driver is missing or it is newer than this
        code.
        """
        if not 0 < lease_s < MAX_LEASE_S:
            raise ValueError(f"lease_s must be above 0 and below {MAX_LEASE_S}, got {lease_s}")
        return cls(await Database.open(url), timedelta(seconds=lease_s))

    @property
    def database(self) -> Database:
        """For tables of the caller's own in the same database; closed with the store."""
        return self._database

    async def close(self) -> None:
        """Close all connections; idempotent."""
        await self._database.close()

    async def add_boundary(
        self, record: BoundaryRecord, *, evidence: Mapping[str, Any], actor: str
    ) -> StoredBoundary:
        """Keep a record as the next version of its adapter, without activating it."""
        async with self._database.writing() as write:
            return await history.add(write, record, evidence, actor)

    async def history(self, key: AdapterKey, limit: int = 100) -> list[StoredBoundary]:
        """The records of an adapter, newest first."""
        async with self._database.reading() as session:
            return await history.newest_first(session, key, _checked(limit))

    async def boundary(self, id: str) -> StoredBoundary | None:
        """A record by its id."""
        async with self._database.reading() as session:
            return await history.by_id(session, id)

    async def version(self, key: AdapterKey, version: int) -> StoredBoundary | None:
        """A record by its place in an adapter's history."""
        async with self._database.reading() as session:
            return await history.by_version(session, key, version)

    async def activate(
        self,
        key: AdapterKey,
        version: int | None,
        *,
        action: Action,
        actor: str,
        reason: str | None = None,
    ) -> Activation:
        """Let a version count from now on; None, with `deactivate`, lets none count.

        Raises StoreError if the adapter has no such version.
        """
        async with self._database.writing() as write:
            return await history.activate(
                write, key, version, action=action, actor=actor, reason=reason
            )

    async def pin(self, record: BoundaryRecord, *, actor: str) -> tuple[StoredBoundary, Activation]:
        """Keep a manual record and activate it for its own reason."""
        if record.method != "manual":
            raise ValueError("only a manual record is pinned")
        async with self._database.writing() as write:
            return await history.add_active(write, record, {}, action="pin", actor=actor)

    async def import_first(
        self, record: BoundaryRecord, *, actor: str
    ) -> tuple[StoredBoundary, Activation] | None:
        """Keep and activate a record from elsewhere if its adapter has no history here.

        None if it has one: what was decided here is not overruled by a file. Safe when several
        processes load the same adapter at once.
        """
        async with self._database.writing() as write:
            if await history.has_any(write.session, AdapterKey.of(record)):
                return None
            return await history.add_active(write, record, {}, action="import", actor=actor)

    async def active(self, key: AdapterKey) -> StoredBoundary | None:
        """The record that counts for an adapter; None means full depth."""
        async with self._database.reading() as session:
            row = await history.active_row(session, key)
            return None if row is None else history.stored(row)

    async def active_since(self, sequence: int) -> list[Activation]:
        """The newest activation of each key that changed after `sequence`, oldest first.

        For whoever polls: pass the last `sequence` seen, at first 0, which gives all. Never misses
        one, since activations become visible in the order of their numbers.
        """
        async with self._database.reading() as session:
            return await history.active_since(session, sequence)

    async def audit(
        self,
        limit: int = 100,
        before: int | None = None,
        *,
        where: Mapping[Column, str] | None = None,
    ) -> list[AuditEntry]:
        """The newest entries first; `before` an entry's id gives the next older ones.

        where: what entries must have.
        """
        async with self._database.reading() as session:
            return await audit.entries(session, _checked(limit), before, where or {})

    async def add_audit(
        self,
        *,
        actor: str,
        action: str,
        subject: str,
        details: Mapping[str, Any] | None = None,
        outcome: Outcome = "ok",
    ) -> AuditEntry:
        """Note something that happened outside the store.

        actor: a name, or `NAME:REQUEST_ID` of who acts through a request.
        """
        async with self._database.writing() as write:
            return await audit.note(
                write,
                actor=actor,
                action=action,
                subject=subject,
                details=details or {},
                outcome=outcome,
            )

    async def create_job(
        self,
        adapter_name: str,
        key: AdapterKey,
        request: Mapping[str, Any],
        *,
        owner: str,
        actor: str,
    ) -> Job:
        """Queue a job and take its lease.

        A queued or running job of the same key whose lease is over is marked `interrupted` and
        makes way. Raises JobRunning, with the job, if its lease is not over.
        """
        async with self._database.writing() as write:
            return await jobs.create(write, adapter_name, key, request, owner, actor, self._lease)

    async def start_job(self, id: str, owner: str) -> Job:
        """Queued to running. Raises JobLost."""
        async with self._database.writing() as write:
            return await jobs.start(write, id, owner, self._lease)

    async def report(self, id: str, owner: str, *, stage: str, done: int, total: int) -> Job:
        """Note progress of a running job and renew its lease. Raises JobLost.

        The owner looks at `is_cancel_requested` of what comes back.
        """
        async with self._database.writing() as write:
            return await jobs.report(write, id, owner, stage, done, total, self._lease)

    async def heartbeat(self, id: str, owner: str) -> Job:
        """Renew the lease of a queued or running job. Raises JobLost."""
        async with self._database.writing() as write:
            return await jobs.heartbeat(write, id, owner, self._lease)

    async def finish_job(
        self,
        id: str,
        owner: str,
        state: FinalState,
        *,
        record: BoundaryRecord | None = None,
        evidence: Mapping[str, Any] | None = None,
        activate: bool = False,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> Job:
        """End a job; its record, the activation, the audit entries and the state become one fact.

        Only a running job succeeds; a queued one may fail or be cancelled. A cancellation that was
        requested before wins over success: the job ends as `cancelled` and no record is kept, so
        look at the state of what comes back. Raises JobLost, and changes nothing, if the job is
        not this owner's any more.
        """
        async with self._database.writing() as write:
            return await jobs.finish(
                write, id, owner, state, record, evidence or {}, activate, result, error
            )

    async def interrupt_job(self, id: str, owner: str, *, reason: str) -> Job:
        """End a job that its owner cannot go on with, such as one that is shut down.

        Nothing of it is kept; whoever wants it starts another. Raises JobLost.
        """
        async with self._database.writing() as write:
            return await jobs.interrupt(write, id, owner, reason)

    async def request_cancel(self, id: str, actor: str) -> Job:
        """Ask a job's owner to stop; a finished job comes back as it is.

        Raises StoreError if there is no such job.
        """
        async with self._database.writing() as write:
            return await jobs.request_cancel(write, id, actor)

    async def reap(self, but: str | None = None) -> list[Job]:
        """Mark every unfinished job whose lease is over as `interrupted`; gives those.

        but: an owner whose jobs are spared: the caller, who knows that it lives.
        A lease that ends later than any can, because the clock was set back since, is cut to this
        store's length, so that the job of a dead process is not held for hours.
        """
        async with self._database.writing() as write:
            return await jobs.reap(write, self._lease, but)

    async def jobs(self, limit: int = 100) -> list[Job]:
        """The newest jobs first."""
        async with self._database.reading() as session:
            return await jobs.newest_first(session, _checked(limit))

    async def job(self, id: str) -> Job | None:
        """A job by its id."""
        async with self._database.reading() as session:
            return await jobs.by_id(session, id)


def _checked(limit: int) -> int:
    """To SQLite, a limit below 0 is none."""
    if limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    return limit
