"""`/admin/jobs` and what starts one: recalibration while the server serves."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from boundary.store.store import StoreError
from server.api import query
from server.api.admin.audit import AuditLog
from server.api.admin.recalibration import RecalibrateRequest, plan
from server.api.admin.request import actor
from server.api.admin.responses import JobAnswer, JobList, JobView
from server.api.body import json_body
from server.api.error_response import told
from server.api.health import Readiness, accepting
from server.api.openapi import body_of, query_of
from server.api.stream import Chunk, EventStream, encode, primed
from server.calibration.service import CalibrationService
from server.config import Settings
from server.engine.protocol import Engine
from server.errors import NotFound


class JobEvents(EventStream):
    """`progress` whenever a job has changed, and `done` with the finished one."""

    end = b""

    def event(self, chunk: Chunk) -> bytes:
        """A job as it is sent."""
        assert isinstance(chunk, JobView)
        return encode(chunk.model_dump_json(), "progress" if chunk.finished_at is None else "done")


def jobs_router(
    settings: Settings,
    engine: Engine,
    readiness: Readiness,
    calibration: CalibrationService,
    audit: AuditLog,
) -> APIRouter:
    """Part of `admin_router`."""
    router = APIRouter()
    check_accepting = accepting(readiness)

    @router.post(
        "/adapters/{name}/recalibrate",
        status_code=202,
        openapi_extra=body_of(RecalibrateRequest),
    )
    async def recalibrate(
        http: Request,
        name: str,
        body: Annotated[
            RecalibrateRequest, Depends(json_body(RecalibrateRequest, settings.max_body_bytes))
        ],
    ) -> JobAnswer:
        """Start a job that finds the adapter's depth; one an adapter at a time."""
        query.check_names(http)
        await check_accepting()
        async with audit.attempt(http, "job.create", f"adapter:{name}", is_noted=True):
            jobs = calibration.jobs
            try:
                adapter = await engine.resolve(name)
            except NotFound as error:
                raise NotFound(
                    f"adapter {name!r} does not exist", param="name", code="adapter_not_found"
                ) from error
            job = await jobs.start(await plan(body, adapter, engine, settings), actor(http))
        return JobAnswer(job=JobView.of(job))

    @router.get("/jobs", openapi_extra=query_of(limit=query.LIMIT))
    async def list_jobs(http: Request) -> JobList:
        """The newest first, those of every process that shares the store."""
        query.check_names(http, "limit")
        jobs = await calibration.jobs.jobs(query.limit(http))
        return JobList(jobs=[JobView.of(job) for job in jobs])

    @router.get("/jobs/{id}")
    async def show_job(http: Request, id: str) -> JobView:
        """State, progress and result."""
        query.check_names(http)
        return JobView.of(await calibration.jobs.job(id))

    @router.get(
        "/jobs/{id}/events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def watch_job(http: Request, id: str) -> Response:
        """The job now and whenever it changes, as server-sent events, until it is done."""
        query.check_names(http)
        jobs = calibration.jobs

        async def views() -> AsyncGenerator[BaseModel, None]:
            async with aclosing(jobs.watch(id, lambda: readiness.is_draining)) as news:
                try:
                    async for job in news:
                        yield JobView.of(job)
                except StoreError as error:
                    raise told(error) from error

        source = views()
        return JobEvents(await primed(source, http.receive), close=source.aclose)

    @router.delete("/jobs/{id}", status_code=202)
    async def cancel_job(http: Request, id: str) -> JobAnswer:
        """Ask a job to stop; one that has finished stays as it is."""
        query.check_names(http)
        async with audit.attempt(http, "job.request_cancel", f"job:{id[:64]}", is_noted=True):
            job = await calibration.jobs.cancel(id, actor(http))
        return JobAnswer(job=JobView.of(job))

    return router
