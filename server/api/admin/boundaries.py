"""`/admin/adapters/{name}/boundaries`: what was found about an adapter, and which of it counts."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from boundary.report.curve_svg import Curve, curve_svg
from boundary.store.history import MAX_VERSION
from boundary.store.store import StoredBoundary
from server.api import query
from server.api.admin.audit import AuditLog
from server.api.admin.request import actor, read_adapter
from server.api.admin.responses import ActivationView, BoundaryView, History
from server.api.body import json_body
from server.api.openapi import body_of, query_of
from server.api.strict import StrictModel
from server.calibration.service import CalibrationService
from server.config import Settings
from server.engine.protocol import Engine
from server.errors import NotFound

Reason = Annotated[
    str, Field(min_length=1, max_length=2000, pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")
]

SVG_HEADERS = {
    # A drawing shows strangers' names: it is text, and stays text.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
}


class ActivateRequest(StrictModel):
    """Body of `POST .../activate`, which may be left out."""

    reason: Reason | None = None


class PinRequest(StrictModel):
    """Body of `PUT /admin/adapters/{name}/boundary`."""

    depth: int
    reason: Reason


def boundaries_router(
    settings: Settings, engine: Engine, calibration: CalibrationService, audit: AuditLog
) -> APIRouter:
    """Part of `admin_router`."""
    router = APIRouter()
    read_activation = json_body(ActivateRequest, settings.max_body_bytes)

    async def activate_body(http: Request) -> ActivateRequest:
        is_empty = http.headers.get("content-length", "0") == "0"
        if is_empty and "transfer-encoding" not in http.headers:
            return ActivateRequest()
        return await read_activation(http)

    @router.get("/adapters/{name}/boundaries", openapi_extra=query_of(limit=query.LIMIT))
    async def list_boundaries(http: Request, name: str) -> History:
        """Every record of the adapter's content with curve, evidence and verdict, newest first."""
        query.check_names(http, "limit")
        store = calibration.store
        adapter = await read_adapter(engine, name)
        key = calibration.boundaries.key(adapter)
        records = await store.history(key, query.limit(http))
        active = await store.active(key)
        version = None if active is None else active.version
        return History(
            adapter=name,
            digest=key.adapter,
            active_version=version,
            boundaries=[BoundaryView.of(kept, version) for kept in records],
        )

    @router.post(
        "/adapters/{name}/boundaries/{version}/activate",
        openapi_extra=body_of(ActivateRequest, required=False),
    )
    async def activate(
        http: Request,
        name: str,
        version: str,
        body: Annotated[ActivateRequest, Depends(activate_body)],
    ) -> ActivationView:
        """Let a version count from now on, rolling forward or back."""
        query.check_names(http)
        number = query.integer(version, "version", 1, MAX_VERSION)
        target = f"adapter:{name}"
        async with audit.attempt(http, "boundary.activate", target, is_noted=True) as detail:
            detail["version"] = number
            activation = await calibration.boundaries.activate(
                await read_adapter(engine, name), number, actor=actor(http), reason=body.reason
            )
        return ActivationView.of(name, activation)

    @router.put("/adapters/{name}/boundary", openapi_extra=body_of(PinRequest))
    async def pin(
        http: Request,
        name: str,
        body: Annotated[PinRequest, Depends(json_body(PinRequest, settings.max_body_bytes))],
    ) -> ActivationView:
        """Let a depth count that somebody decided; kept in the history like any other."""
        query.check_names(http)
        target = f"adapter:{name}"
        async with audit.attempt(http, "boundary.pin", target, is_noted=True) as detail:
            detail["depth"] = body.depth
            _, activation = await calibration.boundaries.pin(
                await read_adapter(engine, name), body.depth, actor=actor(http), reason=body.reason
            )
        return ActivationView.of(name, activation)

    @router.get(
        "/boundaries/{id}/curve.svg",
        response_class=Response,
        responses={200: {"content": {"image/svg+xml": {}}}},
    )
    async def draw_curve(http: Request, id: str) -> Response:
        """The record's curve with its intervals and its chosen depth."""
        query.check_names(http)
        kept = await calibration.store.boundary(id)
        if kept is None:
            raise NotFound(f"there is no boundary {id!r}", param="id")
        if kept.record.curve is None:
            raise NotFound(
                f"boundary {id!r} was pinned by hand and has no curve", param="id", code="no_curve"
            )
        names = [each.name for each in engine.adapters() if each.digest == kept.key.adapter]
        svg = await asyncio.to_thread(_draw, kept, names[0] if names else kept.key.adapter)
        return Response(svg, media_type="image/svg+xml", headers=SVG_HEADERS)

    return router


def _draw(kept: StoredBoundary, adapter: str) -> str:
    controls = kept.evidence.get("controls", {})
    means = {name: control["mean"] for name, control in controls.items()}
    return curve_svg(Curve.of_record(kept.record), adapter, means)
