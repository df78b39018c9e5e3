"""Whether the server lives, whether it takes work, what it is, and what it counts.

`/health` fails when only a restart helps; `/ready` also while the server drains, so that a load
balancer stops sending while accepted requests finish.
"""

from dataclasses import dataclass

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server import __version__
from server.api.metrics import Metrics
from server.engine.protocol import Engine
from server.errors import EngineDead


@dataclass(slots=True)
class Readiness:
    """Set by whoever starts and stops the server; read by `/ready`."""

    is_draining: bool = False


def health_router(engine: Engine, metrics: Metrics, readiness: Readiness) -> APIRouter:
    """Routes that need no key."""
    router = APIRouter()

    def check_alive() -> None:
        if not engine.is_alive:
            raise EngineDead("the engine thread has ended; restart the server")

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine lives."""
        check_alive()
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """200 while new requests are welcome."""
        check_alive()
        if readiness.is_draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        return JSONResponse({"status": "ready"})

    @router.get("/version")
    async def version() -> Response:
        """The server's version."""
        return JSONResponse({"version": __version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """Prometheus's text format."""
        return Response(
            generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    return router
