"""`/admin/adapters`: what is loaded, loading and unloading."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from server.api import query
from server.api.admin.audit import AuditLog
from server.api.admin.request import adapter_location, known_adapter
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

DRAIN_POLL_S = 0.05


class LoadAdapter(StrictModel):
    """Body of `PUT /admin/adapters/{name}`."""

    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
    replace: bool = False
    """Whether a name that is loaded gets new content; without it that is a conflict."""


def adapters_router(
    settings: Settings,
    engine: Engine,
    metrics: Metrics,
    calibration: CalibrationService,
    audit: AuditLog,
) -> APIRouter:
    """Part of `admin_router`."""
    router = APIRouter(prefix="/adapters")

    def num_running(adapter: AdapterRef) -> int:
        requests = [seen.request for seen in metrics.in_flight.values()]
        return sum(request.lora.adapter == adapter for request in requests)

    def views(adapters: list[AdapterRef]) -> list[AdapterView]:
        running, layers = metrics.running(), engine.layer_counts()
        return [
            AdapterView.of(adapter, engine, calibration, metrics, running, layers)
            for adapter in adapters
        ]

    @router.get("")
    async def list_adapters(http: Request) -> AdapterList:
        """Names, residency, memory and active depth."""
        query.check_names(http)
        return AdapterList(
            base=engine.info.name,
            revision=engine.info.revision,
            num_layers=engine.info.num_layers,
            adapters=views(engine.adapters()),
        )

    @router.put("/{name}", openapi_extra=body_of(LoadAdapter))
    async def load_adapter(
        http: Request,
        name: str,
        body: Annotated[LoadAdapter, Depends(json_body(LoadAdapter, settings.max_body_bytes))],
    ) -> AdapterView:
        """Read a PEFT checkpoint and serve it under a name."""
        query.check_names(http)
        async with audit.attempt(http, "adapter.load", f"adapter:{name}") as detail:
            place = adapter_location(body.path, "path")
            detail["path"] = body.path
            try:
                adapter = await engine.load_adapter(name, place, replace=body.replace)
            except FathomError as error:  # which speaks of vLLM's fields
                fields = {"lora_name": "name", "lora_path": "path"}
                error.param = fields.get(error.param or "", "path")
                raise
            detail["digest"] = adapter.digest
        await calibration.adapter_came()
        (view,) = views([adapter])
        return view

    @router.delete("/{name}", openapi_extra=query_of(force=query.FLAG))
    async def unload_adapter(http: Request, name: str) -> UnloadedView:
        """Forget a name, and answer when its requests have finished; `?force` does not wait."""
        query.check_names(http, "force")
        is_forced = query.flag(http, "force")
        async with audit.attempt(http, "adapter.unload", f"adapter:{name}") as detail:
            adapter = known_adapter(engine, name)
            detail |= {"path": adapter.path, "digest": adapter.digest}
            await engine.unload_adapter(name)

        async def drained() -> None:
            while num_running(adapter):
                await asyncio.sleep(DRAIN_POLL_S)

        if not is_forced:
            await unless_disconnected(http.receive, drained())
        return UnloadedView(name=name, num_running=num_running(adapter))

    return router
