"""The HTTP application: one engine, every route, one shape of error.

Knows no torch and no model: the engine is what `engine/protocol.py` says, so a fake can stand in
its place. Whoever serves the application sets `app.state.readiness.is_draining` when it stops.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server import __version__
from server.access.service import Access
from server.api.admin.adapters import LoadAdapter
from server.api.admin.boundaries import ActivateRequest, PinRequest
from server.api.admin.keys import CreateKey
from server.api.admin.recalibration import RecalibrateRequest
from server.api.admin.router import admin_router
from server.api.error_response import add_error_handlers
from server.api.health import Readiness, health_router
from server.api.lora import LoadRequest, UnloadRequest, lora_router
from server.api.metrics import Metrics
from server.api.openai import openai_router
from server.api.openapi import document
from server.api.rate_limit_headers import RateLimitHeadersMiddleware
from server.api.request_id import RequestIdMiddleware
from server.api.schemas import ChatRequest, CompletionRequest
from server.api.token_text import TokenText
from server.api.tokenize import DetokenizeRequest, TokenizeRequest, tokenize_router
from server.calibration.service import CalibrationService
from server.config import Settings
from server.engine.protocol import Engine


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    """An application over a started engine; starting and stopping the engine is the caller's.

    Raises ConfigError for a keys file that cannot be used. Its lifespan opens the store and raises
    StoreUnavailable if it cannot.
    """
    calibration = CalibrationService(engine, settings)
    access = Access(settings, engine.info.name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with calibration.running(), access.running(calibration.database):
            yield

    app = FastAPI(
        lifespan=lifespan,
        title="Fathom",
        version=__version__,
        description="One base model, many LoRA adapters, a depth for every request.",
        docs_url=None,
        redoc_url=None,
    )
    # The first call settles the tokenizer's truncation in place; later ones only read it, so that
    # threads can share it.
    engine.tokenizer.encode("")
    metrics = Metrics(engine, settings)
    tokens = TokenText(engine.tokenizer)
    readiness = app.state.readiness = Readiness()
    app.add_middleware(RateLimitHeadersMiddleware)
    app.add_middleware(RequestIdMiddleware)
    add_error_handlers(app)
    app.include_router(openai_router(settings, engine, metrics, tokens, access))
    app.include_router(lora_router(settings, engine, access))
    app.include_router(tokenize_router(settings, engine, access))
    app.include_router(health_router(engine, metrics, readiness))
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
