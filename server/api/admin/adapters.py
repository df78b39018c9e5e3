"""`/admin/adapters`: what is loaded, loading and unloading."""

import asyncio
from pathlib import Path
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Request
from pydantic import Field

from boundary.store.store import StoreError
from server.api import query
from server.api.admin.request import actor, known_adapter
from server.api.admin.responses import AdapterList, AdapterView, UnloadedView
from server.api.body import json_body
from server.api.disconnect import unless_disconnected
from server.api.metrics import Metrics
from server.api.openapi import body_of, query_of
from server.api.strict import StrictModel
from server.calibration.service import CalibrationService
from server.config import Settings
from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import FathomError

log = structlog.get_logger(__name__)

DRAIN_POLL_S = 0.05


class LoadAdapter(StrictModel):
    """Body of `PUT /admin/adapters/{name}`."""

    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
    replace: bool = False
    """Whether a name that is loaded gets new content; without it that is a conflict."""


def adapters_router(
    settings: Settings, engine: Engine, metrics: Metrics, calibration: CalibrationService
) -> APIRouter:
    """Part of `admin_router`."""
    router = APIRouter(prefix="/adapters")

    async def note(http: Request, action: str, adapter: AdapterRef) -> None:
        """What a store that fails must not undo."""
        if not calibration.is_open:
            return
        try:
            await calibration.store.add_audit(
                actor=actor(http),
                action=action,
                subject=f"adapter:{adapter.digest or 'never read'}",
                details={"name": adapter.name, "path": adapter.path},
            )
            await calibration.boundaries.refresh()  # a record may have come with it
        except StoreError as error:
            log.warning("not in the audit trail", action=action, reason=str(error))

    def num_running(adapter: AdapterRef) -> int:
        requests = [observer.request for observer in metrics.in_flight.values()]
        return sum(request.lora.adapter == adapter for request in requests)

    @router.get("")
    async def list_adapters(http: Request) -> AdapterList:
        """Names, residency, memory and active depth."""
        query.check_names(http)
        return AdapterList(
            base=engine.info.name,
            revision=engine.info.revision,
            adapters=[
                AdapterView.of(adapter, engine, calibration) for adapter in engine.adapters()
            ],
        )

    @router.put("/{name}", openapi_extra=body_of(LoadAdapter))
    async def load_adapter(
        http: Request,
        name: str,
        body: Annotated[LoadAdapter, Depends(json_body(LoadAdapter, settings.max_body_bytes))],
    ) -> AdapterView:
        """Read a PEFT checkpoint and serve it under a name."""
        query.check_names(http)
        try:
            adapter = await engine.load_adapter(name, Path(body.path), replace=body.replace)
        except FathomError as error:  # which speaks of vLLM's fields
            error.param = {"lora_name": "name", "lora_path": "path"}.get(error.param or "", "path")
            raise
        await note(http, "adapter.load", adapter)
        return AdapterView.of(adapter, engine, calibration)

    @router.delete("/{name}", openapi_extra=query_of(force=query.FLAG))
    async def unload_adapter(http: Request, name: str) -> UnloadedView:
        """Forget a name, and answer when its requests have finished; `?force` does not wait."""
        query.check_names(http, "force")
        is_forced = query.flag(http, "force")
        adapter = known_adapter(engine, name)
        await engine.unload_adapter(name)
        await note(http, "adapter.unload", adapter)

        async def drained() -> None:
            while num_running(adapter):
                await asyncio.sleep(DRAIN_POLL_S)

        if not is_forced:
            await unless_disconnected(http.receive, drained())
        return UnloadedView(name=name, num_running=num_running(adapter))

    return router
