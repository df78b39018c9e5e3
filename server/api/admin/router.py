"""The /admin routes: adapters, calibration jobs, boundaries, keys, usage and the audit trail.

All need an admin key, and are off where there is none.
"""

from typing import get_args

from fastapi import APIRouter, Depends, Request

from boundary.store.audit import Column
from server.access.service import Access
from server.api import query
from server.api.admin.adapters import adapters_router
from server.api.admin.audit import AuditLog
from server.api.admin.boundaries import boundaries_router
from server.api.admin.jobs import jobs_router
from server.api.admin.keys import keys_router
from server.api.admin.responses import AuditList, AuditView
from server.api.admin.usage import usage_router
from server.api.auth import admin_guard
from server.api.health import Readiness
from server.api.metrics import Metrics
from server.api.openapi import query_of
from server.calibration.service import CalibrationService
from server.config import Settings
from server.engine.protocol import Engine

AUDIT_COLUMNS = get_args(Column)


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
    audit = AuditLog(calibration)
    router.include_router(adapters_router(settings, engine, metrics, calibration, audit))
    router.include_router(jobs_router(settings, engine, readiness, calibration, audit))
    router.include_router(boundaries_router(settings, engine, calibration, audit))
    router.include_router(keys_router(settings, access, audit))
    router.include_router(usage_router(engine, access))

    @router.get(
        "/audit",
        openapi_extra=query_of(
            limit=query.LIMIT,
            before={"type": "integer", "minimum": 1},
            **{name: {"type": "string"} for name in AUDIT_COLUMNS},
        ),
    )
    async def list_audit(http: Request) -> AuditList:
        """Who did what, the newest first."""
        query.check_names(http, "limit", "before", *AUDIT_COLUMNS)
        before = http.query_params.get("before")
        entries = await calibration.store.audit(
            query.limit(http),
            None if before is None else query.integer(before, "before", 1, 2**63 - 1),
            where={
                name: value
                for name in AUDIT_COLUMNS
                if (value := query.text(http, name)) is not None
            },
        )
        return AuditList(entries=[AuditView.of(entry) for entry in entries])

    return router
