"""Wire models of what the admin routes answer."""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel

from boundary.store import store
from boundary.store.store import Activation, AuditEntry, StoredBoundary
from server.api.metrics import Metrics
from server.calibration.service import CalibrationService
from server.engine.protocol import Engine, LayerCount, Residency
from server.engine.request import AdapterRef


class CalibratedView(BaseModel):
    """The depth that `auto` means."""

    depth: int
    version: int | None
    """Of its record in the store; None for one that is known from `boundary.json` alone."""
    calibrated_at: float
    """Unix time at which the record was made."""


class LayersView(BaseModel):
    """Token-layers of an adapter's requests since the start: one token through one layer is one."""

    applied: int
    skipped: int
    """At or above the request's depth, where LoRA cost nothing."""


class AdapterView(BaseModel):
    """One adapter that was named or loaded."""

    name: str
    digest: str | None
    """None, like `calibrated`, until its weights are first read."""
    rank: int
    num_layers: int
    effective_max_depth: int
    modules: list[str]
    """The kinds that it targets: `q_proj` for every layer's."""
    layers: list[int]
    """Those that have any of its LoRA."""
    num_bytes: int
    path: str
    residency: Residency
    resident_depth: int | None
    """Layers below it are on the device; None where no layer is."""
    calibrated: CalibratedView | None
    refused_record: str | None
    """Why a record that would count for this adapter is not applied."""
    num_requests: int
    """Of this name since this process started; `num_running` of them have not ended."""
    num_running: int
    layer_applications: LayersView

    @classmethod
    def of(
        cls,
        adapter: AdapterRef,
        engine: Engine,
        calibration: CalibrationService,
        metrics: Metrics,
        running: Counter[str],
        layers: Mapping[str, LayerCount],
    ) -> Self:
        """What is known of an adapter now.

        running: requests that have not ended, by name; see `Metrics.running`.
        layers: `Engine.layer_counts`, which is a copy and so is made once for many.
        """
        found = engine.calibrated_depth(adapter)
        counted = layers.get(adapter.name, LayerCount())
        refusal = None
        if calibration.is_open and adapter.digest is not None:
            refusal = calibration.boundaries.refusal(adapter.digest)
        return cls(
            name=adapter.name,
            digest=adapter.digest,
            rank=adapter.rank,
            num_layers=engine.info.num_layers,
            effective_max_depth=adapter.max_depth,
            modules=list(adapter.modules),
            layers=list(adapter.layers),
            num_bytes=adapter.num_bytes,
            path=adapter.path,
            residency=engine.residency(adapter),
            resident_depth=engine.stats().resident_depths.get(adapter.uid),
            calibrated=None
            if found is None
            else CalibratedView(
                depth=found.depth, version=found.version, calibrated_at=found.calibrated_s
            ),
            refused_record=refusal or adapter.boundary_error,
            num_requests=metrics.requests[adapter.name],
            num_running=running[adapter.name],
            layer_applications=LayersView(applied=counted.applied, skipped=counted.skipped),
        )


class AdapterList(BaseModel):
    """All of them, and the base that they adapt."""

    base: str
    revision: str
    num_layers: int
    adapters: list[AdapterView]


class UnloadedView(BaseModel):
    """An adapter that is gone."""

    name: str
    num_running: int
    """Requests that still run with it; 0 unless it was unloaded by force."""


class JobView(BaseModel):
    """One calibration job; `done` of `total` are in the unit of the stage."""

    id: str
    adapter: str
    digest: str
    state: str
    stage: str | None
    done: int
    total: int
    request: dict[str, Any]
    result: dict[str, Any] | None
    boundary_id: str | None
    error: str | None
    actor: str
    owner: str
    is_cancel_requested: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, job: store.Job) -> Self:
        """The same as the store has it."""
        return cls(
            id=job.id,
            adapter=job.adapter_name,
            digest=job.key.adapter,
            state=job.state,
            stage=job.stage,
            done=job.done,
            total=job.total,
            request=dict(job.request),
            result=None if job.result is None else dict(job.result),
            boundary_id=job.boundary_id,
            error=job.error,
            actor=job.actor,
            owner=job.owner,
            is_cancel_requested=job.is_cancel_requested,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
        )


class JobAnswer(BaseModel):
    """A job that was started or asked to stop."""

    job: JobView


class JobList(BaseModel):
    """Jobs, the newest first."""

    jobs: list[JobView]


class BoundaryView(BaseModel):
    """One record of an adapter's history."""

    id: str
    version: int
    is_active: bool
    record: dict[str, Any]
    evidence: dict[str, Any]
    actor: str
    created_at: datetime

    @classmethod
    def of(cls, kept: StoredBoundary, active_version: int | None) -> Self:
        """The same as the store has it."""
        return cls(
            id=kept.id,
            version=kept.version,
            is_active=kept.version == active_version,
            record=kept.record.model_dump(mode="json"),
            evidence=dict(kept.evidence),
            actor=kept.actor,
            created_at=kept.created_at,
        )


class History(BaseModel):
    """The records of one adapter's content, the newest first."""

    adapter: str
    digest: str
    active_version: int | None
    boundaries: list[BoundaryView]


class ActivationView(BaseModel):
    """A decision about which record counts."""

    adapter: str
    digest: str
    boundary_id: str | None
    version: int | None
    depth: int | None
    action: str
    actor: str
    reason: str | None
    at: datetime

    @classmethod
    def of(cls, name: str, activation: Activation) -> Self:
        """The same as the store has it."""
        return cls(
            adapter=name,
            digest=activation.key.adapter,
            boundary_id=activation.boundary_id,
            version=activation.version,
            depth=activation.depth,
            action=activation.action,
            actor=activation.actor,
            reason=activation.reason,
            at=activation.at,
        )


class AuditView(BaseModel):
    """One thing done or tried."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    outcome: str
    """`ok`, `refused` or `failed`."""
    request_id: str | None
    details: dict[str, Any]

    @classmethod
    def of(cls, entry: AuditEntry) -> Self:
        """The same as the store has it."""
        return cls(
            id=entry.id,
            at=entry.at,
            actor=entry.actor,
            action=entry.action,
            subject=entry.subject,
            outcome=entry.outcome,
            request_id=entry.request_id,
            details=dict(entry.details),
        )


class AuditList(BaseModel):
    """Entries, the newest first; `?before=ID` gives the next older ones."""

    entries: list[AuditView]
