"""Whether the server lives, whether it takes work, what it is, and what it counts.

`/health` fails when only a restart helps; `/ready` also while the server drains, so that a load
balancer stops sending while accepted requests finish.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server import __version__
from server.access.service import Access
from server.engine.protocol import Engine
from server.errors import Draining, EngineDead

DRAINING_RETRY_S = 5
"""By then another server should be in its place."""


@dataclass(slots=True)
class Readiness:
    """Set by whoever starts and stops the server; read by `/ready`."""

    is_draining: bool = False


def accepting(readiness: Readiness) -> Callable[[], Awaitable[None]]:
    """A dependency of routes that begin work: none is taken while the server stops."""

    async def check() -> None:
        if readiness.is_draining:
            raise Draining("the server is stopping; ask another", retry_after_s=DRAINING_RETRY_S)

    return check


def health_router(
    engine: Engine, registry: CollectorRegistry, readiness: Readiness, access: Access
) -> APIRouter:
    """Routes that need no key."""
    router = APIRouter()

    def check_alive() -> None:
        if not engine.is_alive:
            raise EngineDead("the engine has died or is stuck; restart the server")

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
        """The server's version, and which keys it asks for: a client that has none can tell."""
        return JSONResponse(
            {
                "version": __version__,
                "needs_api_key": not access.keyring.is_api_open,
                "has_admin": access.keyring.has_admin,
            }
        )

    @router.get("/metrics", response_class=PlainTextResponse)
    def scrape() -> Response:
        """Prometheus's text format."""
        # No coroutine, so on a thread: looking at thousands of adapters takes longer than streams
        # should wait.
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return router
