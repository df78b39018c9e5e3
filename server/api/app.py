"""The HTTP application: one engine, every route, one shape of error.

Knows no torch and no model: the engine is what `engine/protocol.py` says, so a fake can stand in
its place. Whoever serves the application sets `app.state.readiness.is_draining` when it stops.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware

from server import __version__
from server.access.service import Access
from server.api.admin.adapters import LoadAdapter
from server.api.admin.boundaries import ActivateRequest, PinRequest
from server.api.admin.keys import CreateKey
from server.api.admin.recalibration import RecalibrateRequest
from server.api.admin.router import admin_router
from server.api.error_response import add_error_handlers
from server.api.exchange import AccessLogMiddleware
from server.api.health import Readiness, health_router
from server.api.lora import LoadRequest, UnloadRequest, lora_router
from server.api.metrics import Metrics
from server.api.openai import openai_router
from server.api.openapi import document
from server.api.rate_limit_headers import RateLimitHeadersMiddleware
from server.api.request_id import RequestIdMiddleware
from server.api.schemas import ChatRequest, CompletionRequest
from server.api.scrape import metrics_registry
from server.api.security_headers import SecurityHeadersMiddleware
from server.api.token_text import TokenText
from server.api.tokenize import DetokenizeRequest, TokenizeRequest, tokenize_router
from server.calibration.service import CalibrationService
from server.config import Settings
from server.connections import Connections
from server.console.router import console_router
from server.engine.protocol import Engine
from server.logs import log_loop_error

if TYPE_CHECKING:
    from server.api.tracing import Tracing

NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


def create_app(
    settings: Settings,
    engine: Engine,
    tracing: "Tracing | None" = None,
    connections: Connections | None = None,
) -> FastAPI:
    """An application over a started engine; starting and stopping the engine is the caller's.

    tracing: where requests leave their traces; without it no code of it runs. connections: of the server that
    serves this, for `/metrics`.
    Raises ConfigError for a keys file that cannot be used. Its lifespan opens the store and raises
    StoreUnavailable if it cannot.
    """
    calibration = CalibrationService(engine, settings)
    access = Access(settings, engine.info.name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        handler = loop.get_exception_handler()
        loop.set_exception_handler(log_loop_error)
        try:
            async with calibration.running(), access.running(calibration.database):
                yield
        finally:
            loop.set_exception_handler(handler)

    app = FastAPI(
        lifespan=lifespan,
        title="Fathom",
        version=__version__,
        description="One base model, many LoRA adapters, a depth for every request.",
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TELEMETRY if tracing is None else tracing.telemetry,
        redirect_slashes=False,  # a POST that is sent elsewhere is not what any client expects
    )
    # The first call settles the tokenizer's truncation in place; later ones only read it, so that
    # threads can share it.
    engine.tokenizer.encode("")
    metrics = Metrics(engine.info, settings)
    registry = metrics_registry(engine, settings, metrics, access, calibration, connections)
    tokens = TokenText(engine.tokenizer)
    readiness = app.state.readiness = Readiness()
    app.add_middleware(RateLimitHeadersMiddleware)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(SecurityHeadersMiddleware)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # what it takes to send a key and what clients say of themselves
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(
        AccessLogMiddleware,
        tokenizer=engine.tokenizer if settings.log_prompts else None,
        tracing=tracing,
    )
    add_error_handlers(app)
    app.include_router(openai_router(settings, engine, metrics, tokens, access, readiness, tracing))
    app.include_router(lora_router(settings, engine, calibration, access))
    app.include_router(tokenize_router(settings, engine, access))
    app.include_router(health_router(engine, registry, readiness, access))
    if settings.console:
        app.include_router(console_router())
    app.include_router(admin_router(settings, engine, metrics, readiness, calibration, access))
    document(
        app,
        [
            CompletionRequest,
            ChatRequest,
            TokenizeRequest,
            DetokenizeRequest,
            LoadRequest,
            UnloadRequest,
            LoadAdapter,
            RecalibrateRequest,
            ActivateRequest,
            PinRequest,
            CreateKey,
        ],
    )
    return app
