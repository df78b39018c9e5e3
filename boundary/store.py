"""The store of calibration: records, which of them is active, jobs and the audit trail.

One object over one database, SQLite or PostgreSQL, which many processes may open at once. It knows
no model and runs no job; the server and `fathom calibrate` call it from an event loop.

Every method is one transaction: done wholly or not at all, also when the process is killed in it.
Whatever changes something writes its audit entry in the same transaction. All times are UTC.
Everything may raise StoreError; misuse that no user can cause is a ValueError.
"""

from collections.abc import Mapping
from typing import Any, Self

from boundary.database import StoreError
from boundary.history import Action, Activation, AdapterKey, AuditEntry, StoredBoundary
from boundary.jobs import FinalState, Job, JobLost, JobRunning
from boundary.record import BoundaryRecord

__all__ = [
    "Activation",
    "AdapterKey",
    "AuditEntry",
    "Job",
    "JobLost",
    "JobRunning",
    "Store",
    "StoreError",
    "StoredBoundary",
]


class Store:
    """Records, activations, jobs and audit of one database; made by `open`."""

    @classmethod
    async def open(cls, url: str, *, lease_s: float = 10.0) -> Self:
        """Open a database and bring its tables up to date, whoever else is doing the same.

        url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user@host/name`.
        lease_s: how long a job of this process counts as alive after its last sign of life.

        Raises StoreError if it cannot be reached, its driver is missing or it is newer than this
        code.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Close all connections; idempotent."""
        raise NotImplementedError

    async def add_boundary(
        self, record: BoundaryRecord, *, evidence: Mapping[str, Any], actor: str
    ) -> StoredBoundary:
        """Keep a record as the next version of its adapter, without activating it."""
        raise NotImplementedError

    async def history(self, key: AdapterKey, limit: int = 100) -> list[StoredBoundary]:
        """The records of an adapter, newest first."""
        raise NotImplementedError

    async def boundary(self, id: str) -> StoredBoundary | None:
        """A record by its id."""
        raise NotImplementedError

    async def version(self, key: AdapterKey, version: int) -> StoredBoundary | None:
        """A record by its place in an adapter's history."""
        raise NotImplementedError

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
        raise NotImplementedError

    async def pin(self, record: BoundaryRecord, *, actor: str) -> tuple[StoredBoundary, Activation]:
        """Keep a manual record and activate it for its own reason."""
        raise NotImplementedError

    async def import_first(
        self, record: BoundaryRecord, *, actor: str
    ) -> tuple[StoredBoundary, Activation] | None:
        """Keep and activate a record from elsewhere if its adapter has no history here.

        None if it has one: what was decided here is not overruled by a file. Safe when several
        processes load the same adapter at once.
        """
        raise NotImplementedError

    async def active(self, key: AdapterKey) -> StoredBoundary | None:
        """The record that counts for an adapter; None means full depth."""
        raise NotImplementedError

    async def active_since(self, sequence: int) -> list[Activation]:
        """The newest activation of each key that changed after `sequence`, oldest first.

        For whoever polls: pass the last `sequence` seen, at first 0, which gives all. Never misses
        one, since activations become visible in the order of their numbers.
        """
        raise NotImplementedError

    async def audit(self, limit: int = 100, before: int | None = None) -> list[AuditEntry]:
        """The newest entries first; `before` an entry's id gives the next older ones."""
        raise NotImplementedError

    async def add_audit(
        self, *, actor: str, action: str, subject: str, details: Mapping[str, Any] | None = None
    ) -> AuditEntry:
        """Note something that happened outside the store."""
        raise NotImplementedError

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
        raise NotImplementedError

    async def start_job(self, id: str, owner: str) -> Job:
        """Queued to running. Raises JobLost."""
        raise NotImplementedError

    async def report(self, id: str, owner: str, *, stage: str, done: int, total: int) -> Job:
        """Note progress of a running job and renew its lease. Raises JobLost.

        The owner looks at `is_cancel_requested` of what comes back.
        """
        raise NotImplementedError

    async def heartbeat(self, id: str, owner: str) -> Job:
        """Renew the lease of a queued or running job. Raises JobLost."""
        raise NotImplementedError

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
        raise NotImplementedError

    async def request_cancel(self, id: str, actor: str) -> Job:
        """Ask a job's owner to stop; a finished job comes back as it is.

        Raises StoreError if there is no such job.
        """
        raise NotImplementedError

    async def reap(self) -> list[Job]:
        """Mark every unfinished job whose lease is over as `interrupted`; gives those."""
        raise NotImplementedError

    async def jobs(self, limit: int = 100) -> list[Job]:
        """The newest jobs first."""
        raise NotImplementedError

    async def job(self, id: str) -> Job | None:
        """A job by its id."""
        raise NotImplementedError
