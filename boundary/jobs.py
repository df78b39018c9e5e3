"""Calibration jobs: at most one an adapter, held by a process for as long as it renews its lease."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from boundary.database import StoreError
from boundary.history import AdapterKey

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
FinalState = Literal["succeeded", "failed", "cancelled"]


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
        return self.state not in ("queued", "running")


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
