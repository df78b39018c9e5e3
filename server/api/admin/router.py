"""The /admin routes: adapters, calibration jobs, boundaries, keys, usage and the audit trail.

All need an admin key, and are off where there is none.
"""

from fastapi import APIRouter, Depends, Request

from server.access.service import Access
from server.api import query
from server.api.admin.adapters import adapters_router
from server.api.admin.boundaries import boundaries_router
from server.api.admin.jobs import jobs_router
from server.api.admin.keys import keys_router
from server.api.admin.responses import AuditList, AuditView
from server.api.admin.usage import usage_router
from server.api.auth import admin_guard
from server.api.health import Readiness
from server.api.metrics import Metrics
from server.calibration.service import CalibrationService
from server.config import Settings
from server.engine.protocol import Engine


def admin_router(
    settings: Settings,
    engine: Engine,
    metrics: Metrics,
    readiness: Readiness,
    calibration: CalibrationService,
    access: Access,
) -> APIRouter:
    """Routes that need the admin key."""
    router = APIRouter(prefix="/admin", dependencies=[Depends(admin_guard(access))])
    router.include_router(adapters_router(settings, engine, metrics, calibration))
    router.include_router(jobs_router(settings, engine, readiness, calibration))
    router.include_router(boundaries_router(settings, engine, calibration))
    router.include_router(keys_router(settings, access))
    router.include_router(usage_router(engine, access))

    @router.get("/audit")
    async def list_audit(http: Request) -> AuditList:
        """Who did what, the newest first."""
        query.check_names(http, "limit", "before")
        before = http.query_params.get("before")
        entries = await calibration.store.audit(
            query.limit(http),
            None if before is None else query.integer(before, "before", 1, 2**63 - 1),
        )
        return AuditList(
            entries=[
                AuditView(
                    id=entry.id,
                    at=entry.at,
                    actor=entry.actor,
                    action=entry.action,
                    subject=entry.subject,
                    details=dict(entry.details),
                )
                for entry in entries
            ]
        )

    return router
