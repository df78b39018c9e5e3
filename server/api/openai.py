"""The `/v1` routes of OpenAI's API: completions, chat, models."""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.access.service import Access
from server.api.auth import api_guard, caller, count_request, rates
from server.api.body import json_body
from server.api.chat import chat_job
from server.api.completions import completion_job
from server.api.disconnect import unless_disconnected
from server.api.exchange import exchange_of
from server.api.generation import generate
from server.api.health import Readiness, accepting
from server.api.job import Job, wanted_tokens
from server.api.metering import metered
from server.api.metrics import Metrics
from server.api.models import ModelCard, ModelList, find_card, list_cards
from server.api.openapi import EVENTS, body_of
from server.api.responses import ChatResponse, TextCompletion
from server.api.schemas import ChatRequest, CompletionRequest
from server.api.stream import LAST_READ_S, EventStream, primed
from server.api.token_text import TokenText
from server.config import Settings
from server.engine.protocol import Engine

if TYPE_CHECKING:
    from server.api.tracing import Tracing


def openai_router(
    settings: Settings,
    engine: Engine,
    metrics: Metrics,
    tokens: TokenText,
    access: Access,
    readiness: Readiness,
    tracing: "Tracing | None" = None,
) -> APIRouter:
    """Routes that need an API key, where there is one."""
    router = APIRouter(
        prefix="/v1", dependencies=[Depends(api_guard(access)), Depends(accepting(readiness))]
    )
    is_work = [Depends(count_request)]

    async def answer(http: Request, job: Job, *, is_stated: bool) -> Response:
        """Run a job; stream it or send it whole. A client that leaves ends it either way."""
        outputs = metered(
            generate(
                engine,
                job.requests,
                timeout_s=settings.request_timeout_s,
                metrics=metrics,
                exchange=exchange_of(http),
                tracing=tracing,
            ),
            job.requests,
            key=caller(http),
            rates=rates(http),
            ledger=access.ledger,
            is_stated=is_stated,
        )
        if job.is_stream:
            source = await primed(outputs, http.receive)
            return EventStream(
                job.chunks(source),
                outputs.aclose,
                timeout_s=settings.request_timeout_s + LAST_READ_S,
            )
        whole = await unless_disconnected(http.receive, job.response(outputs))
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")

    @router.post(
        "/completions",
        response_model=TextCompletion,
        responses=EVENTS,
        openapi_extra=body_of(CompletionRequest),
        dependencies=is_work,
    )
    async def create_completion(
        http: Request,
        body: Annotated[
            CompletionRequest, Depends(json_body(CompletionRequest, settings.max_body_bytes))
        ],
    ) -> Response:
        """Continue one prompt or several."""
        job = await completion_job(body, engine, settings, tokens, caller(http).grant)
        return await answer(http, job, is_stated=wanted_tokens(body) is not None)

    @router.post(
        "/chat/completions",
        response_model=ChatResponse,
        responses=EVENTS,
        openapi_extra=body_of(ChatRequest),
        dependencies=is_work,
    )
    async def create_chat_completion(
        http: Request,
        body: Annotated[ChatRequest, Depends(json_body(ChatRequest, settings.max_body_bytes))],
    ) -> Response:
        """Reply to a conversation."""
        job = await chat_job(body, engine, settings, tokens, caller(http).grant)
        return await answer(http, job, is_stated=wanted_tokens(body) is not None)

    @router.get("/models", response_model=ModelList)
    def list_models(http: Request) -> Response:
        """The base model, then each adapter, as far as the key may use them."""
        # No coroutine, so on a thread: cards of thousands take longer than streams should wait.
        cards = ModelList(data=list_cards(engine, caller(http).grant))
        return Response(cards.model_dump_json(), media_type="application/json")

    @router.get("/models/{model_id:path}")
    async def retrieve_model(http: Request, model_id: str) -> ModelCard:
        """One of them."""
        return find_card(engine, model_id, caller(http).grant)

    return router
