"""Calibration jobs of this process: started, followed, cancelled, and ended in one transaction.

One runs at a time and the others wait, each with its lease. The store has every job, also those of
other processes; progress is written to it twice a second, and whoever watches a job of this process
sees it sooner. Knows no HTTP.

A job ends in one of these ways: `succeeded`, with its record and, if that was asked for and the
verdict allows it, its activation in the same transaction; `failed`, with a reason for whoever sent
the samples; `cancelled`; `interrupted`, when its server stops or dies. In all but the first nothing
is kept of it.
"""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

import structlog

from boundary.dataset import Dataset
from boundary.options import CalibrationOptions
from boundary.progress import Progress
from boundary.record import BoundaryRecord
from boundary.store.jobs import FinalState
from boundary.store.store import Job, JobLost, NoSuchJob, Store, StoreError
from boundary.store.tables import storable
from server.calibration import pipeline
from server.calibration.boundaries import Boundaries
from server.calibration.generation import GenerationOptions
from server.calibration.outcome import Outcome
from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import Draining, FathomError
from server.following import follow, wait_or

log = structlog.get_logger(__name__)

REPORT_S = 0.5
REAP_S = 1.0
WATCH_S = 0.1
"""Between two looks of whoever watches a job that runs here."""
STILL_S = 10.0
"""A watched job is told again after so long without news, so that no proxy ends the stream."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job is to do, checked and loaded.

    asked: the request as the store keeps it; JSON.
    """

    adapter: AdapterRef
    dataset: Dataset
    options: CalibrationOptions
    generation: GenerationOptions
    activate: bool
    is_dry_run: bool
    asked: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _End:
    """How a job's own work ended, for the store."""

    state: FinalState
    record: BoundaryRecord | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    activate: bool = False
    result: Mapping[str, Any] | None = None
    error: str | None = None


class _Live:
    """A job of this process that is not finished."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._progress: Progress | None = None
        self.changed = asyncio.Event()
        self.wake = asyncio.Event()
        """Look at the job now."""
        self.cause: Literal["cancel", "lost", "stop"] | None = None
        """Why the work was ended from outside."""
        self.is_over = False

    @property
    def job(self) -> Job:
        """As it is now, with progress that the store may not have yet."""
        if self._progress is None or self._job.is_finished:
            return self._job
        progress = self._progress
        return replace(self._job, stage=progress.stage, done=progress.done, total=progress.total)

    @job.setter
    def job(self, job: Job) -> None:
        self._job = job
        self._tell()

    def progress(self, progress: Progress) -> None:
        """News of its work."""
        self._progress = progress
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class JobManager:
    """The jobs of one engine; owned by one event loop."""

    def __init__(self, engine: Engine, store: Store, boundaries: Boundaries) -> None:
        self._engine = engine
        self._store = store
        self._boundaries = boundaries
        self._owner = f"{socket.gethostname()}/{os.getpid()}/{uuid4().hex[:8]}"
        self._live: dict[str, _Live] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._is_stopping = False

    async def start(self, plan: Plan, actor: str) -> Job:
        """Queue a job. Raises JobRunning, with the job that the adapter has already; StoreError."""
        key = self._boundaries.key(plan.adapter)
        job = await self._store.create_job(
            plan.adapter.name, key, plan.asked, owner=self._owner, actor=actor
        )
        live = self._live[job.id] = _Live(job)
        task = asyncio.create_task(self._run(live, plan))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return job

    async def cancel(self, id: str, actor: str) -> Job:
        """Ask a job to stop, whichever process runs it. Raises NoSuchJob, StoreError."""
        job = await self._store.request_cancel(id, actor)
        if (live := self._live.get(id)) is not None:
            live.wake.set()
        return job

    async def job(self, id: str) -> Job:
        """A job as it is now. Raises NoSuchJob, StoreError."""
        if (live := self._live.get(id)) is not None:
            return live.job
        return await self._stored(id)

    async def jobs(self, limit: int) -> list[Job]:
        """The newest first, those of every process."""
        return [
            live.job if (live := self._live.get(job.id)) is not None else job
            for job in await self._store.jobs(limit)
        ]

    async def watch(
        self, id: str, is_stopping: Callable[[], bool] = bool
    ) -> AsyncGenerator[Job, None]:
        """The job now and whenever it has changed, until it is finished or the server stops.

        The same job comes again where there is no news for long. Raises NoSuchJob, StoreError.
        """
        told: Job | None = None
        told_at = 0.0
        now = asyncio.get_running_loop().time
        while True:
            live = self._live.get(id)
            changed = None if live is None else live.changed
            job = await self.job(id)
            if told is None or _shown(job) != _shown(told) or now() - told_at >= STILL_S:
                told, told_at = job, now()
                yield job
            if job.is_finished or is_stopping():
                return
            if changed is None:
                await asyncio.sleep(REPORT_S)
            else:
                await asyncio.sleep(WATCH_S)
                await wait_or(changed, REPORT_S)

    async def tend(self, stop: asyncio.Event) -> None:
        """Give up jobs whose process died, until told to stop."""
        # Whoever follows the depths says so when the store fails.
        await follow(self._reap, stop, REAP_S, log, "dead jobs were not looked for")

    async def _reap(self) -> None:
        for job in await self._store.reap(but=self._owner):
            log.warning("a job was interrupted", job=job.id, reason=job.error)

    async def stop(self) -> None:
        """Interrupt whatever runs or waits, and wait until the store knows."""
        self._is_stopping = True
        for live in self._live.values():
            live.wake.set()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self, live: _Live, plan: Plan) -> None:
        """One job from its beginning to its end in the store."""
        work = asyncio.create_task(self._work(live, plan))
        keeping = asyncio.create_task(self._keep(live, work))
        end: _End | None = None
        try:
            end = await work
        except asyncio.CancelledError:
            if live.cause is None:
                raise
            if live.cause == "cancel":
                end = _End("cancelled")
        finally:
            live.is_over = True
            live.wake.set()
            await asyncio.gather(keeping, return_exceptions=True)
        try:
            await self._finish(live, end)
        except Exception:
            log.exception("a job could not be ended", job=live.job.id)
        finally:
            del self._live[live.job.id]

    async def _work(self, live: _Live, plan: Plan) -> _End | None:
        try:
            async with self._turn:
                live.job = await self._store.start_job(live.job.id, self._owner)
                outcome = await pipeline.calibrate(
                    self._engine,
                    plan.adapter,
                    plan.dataset,
                    plan.options,
                    plan.generation,
                    live.progress,
                )
        except Draining:
            live.cause = "stop"
            return None
        except FathomError as error:
            return _End("failed", error=storable(error.message))
        except (ValueError, StoreError) as error:
            return _End("failed", error=storable(str(error)))
        except Exception:
            log.exception("a calibration failed", job=live.job.id)
            return _End("failed", error="internal error; the server's log has the rest")
        return _ended(outcome, plan)

    async def _keep(self, live: _Live, work: "asyncio.Task[_End | None]") -> None:
        """Renew the lease, write progress, and end the work when somebody wants that."""
        is_failing = False
        while True:
            await wait_or(live.wake, REPORT_S)
            live.wake.clear()
            if live.is_over:
                return
            try:
                job = await self._report(live.job)
            except (JobLost, NoSuchJob) as error:
                log.warning("a job was lost", job=live.job.id, reason=str(error))
                live.cause = "lost"
            except StoreError as error:
                if not is_failing:
                    log.warning("progress is not kept", job=live.job.id, reason=str(error))
                is_failing = True
            else:
                is_failing = False
                if job.is_cancel_requested:
                    live.job = job
                    live.cause = "cancel"
            if live.cause is None and self._is_stopping:
                live.cause = "stop"
            if live.cause is not None:
                work.cancel()
                return

    async def _report(self, job: Job) -> Job:
        if job.state == "running" and job.stage is not None:
            return await self._store.report(
                job.id, self._owner, stage=job.stage, done=job.done, total=job.total
            )
        return await self._store.heartbeat(job.id, self._owner)

    async def _finish(self, live: _Live, end: _End | None) -> None:
        """Write the end, however long the store cannot be reached, unless the server stops."""
        id = live.job.id
        is_failing = False
        while True:
            try:
                live.job = await self._ended_in_store(id, live, end)
                break
            except (JobLost, NoSuchJob) as error:
                log.warning("a job was lost", job=id, reason=str(error))
                break
            except StoreError as error:
                if self._is_stopping:
                    log.warning("the end of a job is not kept", job=id, reason=str(error))
                    return
                if not is_failing:
                    log.warning("the end of a job waits", job=id, reason=str(error))
                is_failing = True
                await asyncio.sleep(REPORT_S)

    async def _ended_in_store(self, id: str, live: _Live, end: _End | None) -> Job:
        if end is None and live.cause == "stop":
            return await self._store.interrupt_job(id, self._owner, reason="its server was stopped")
        if end is None:
            return await self._stored(id)
        if end.state == "succeeded":
            await self._report(live.job)  # so that a job that is done does not say otherwise
        job = await self._store.finish_job(
            id,
            self._owner,
            end.state,
            record=end.record,
            evidence=end.evidence,
            activate=end.activate,
            result=end.result,
            error=end.error,
        )
        if end.activate and job.state == "succeeded":
            try:
                await self._boundaries.refresh()
            except StoreError as error:  # whoever follows the depths will
                log.warning("an activation is not in force yet", job=id, reason=str(error))
        return job

    async def _stored(self, id: str) -> Job:
        job = await self._store.job(id)
        if job is None:
            raise NoSuchJob(id)
        return job


def _ended(outcome: Outcome, plan: Plan) -> _End:
    """What is kept of a calibration that came to its end."""
    is_conclusive = outcome.record is not None
    activate = plan.activate and outcome.changes_depth and not plan.is_dry_run
    report = outcome.report
    selection = report.selection
    result: dict[str, Any] = {
        "verdict": selection.verdict,
        "verdict_in_words": outcome.summary,
        "depth": selection.depth,
        "proposed_depth": selection.proposed_depth,
        "num_layers": report.num_layers,
        "scores": report.scores,
        "share_saved": report.share_saved,
        "num_samples": selection.num_samples,
        "num_samples_given": plan.dataset.num_given,
        "num_samples_needed": selection.num_samples_needed,
        "truncated_lines": list(plan.dataset.truncated_lines),
        "is_dry_run": plan.is_dry_run,
        "is_activated": activate,
    }
    if plan.is_dry_run:
        record = outcome.record
        result["record"] = None if record is None else record.model_dump(mode="json")
        result["evidence"] = outcome.evidence()
        return _End("succeeded", result=result)
    if not is_conclusive:
        return _End("failed", result=result, error=storable(outcome.summary))
    return _End(
        "succeeded",
        record=outcome.record,
        evidence=outcome.evidence(),
        activate=activate,
        result=result,
    )


def _shown(job: Job) -> tuple[object, ...]:
    """What a watcher sees change; a lease is no news."""
    return job.state, job.stage, job.done, job.total, job.is_cancel_requested
