"""The thin HTTP layer over libraries that have none: one static batch at a time, one adapter a batch.

Run in a library's own environment, which needs FastAPI and uvicorn and nothing of Fathom. Requests
that wait are gathered until none has come for `_QUIET_S` or `MAX_BATCH` are there, then answered
adapter by adapter. These libraries give a batch's tokens when it is done, so the stream is one event.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

MAX_BATCH = 16
BASE = "base"
_QUIET_S = 0.005

Complete = Callable[[list[list[int]], int, str | None], list[list[int]]]
"""Prompts of one length, tokens wanted, adapter or None -> tokens of each."""


@dataclass(slots=True)
class Waiting:
    """One request until it is answered."""

    prompt: list[int]
    max_tokens: int
    adapter: str | None
    answer: "asyncio.Future[list[int]]"


def serve(complete: Complete, port: int) -> None:
    """Answer until the process is ended."""
    uvicorn.run(application(complete), host="127.0.0.1", port=port, log_level="warning")


def application(complete: Complete) -> FastAPI:
    """`/v1/completions` with token ids as the prompt, streamed; and `/health`."""
    queue: asyncio.Queue[Waiting] = asyncio.Queue()

    @asynccontextmanager
    async def batching(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_batches(queue, complete))
        yield
        task.cancel()

    app = FastAPI(lifespan=batching)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> StreamingResponse:
        adapter = None if body["model"] == BASE else body["model"]
        answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        await queue.put(Waiting(body["prompt"], body["max_tokens"], adapter, answer))
        return StreamingResponse(_events(answer), media_type="text/event-stream")

    return app


async def _events(answer: "asyncio.Future[list[int]]") -> AsyncIterator[str]:
    try:
        tokens = await answer
    except RuntimeError as error:
        yield f"data: {json.dumps({'error': str(error)})}\n\n"
        return
    text = " ".join(f"w{token}" for token in tokens)
    event = {"choices": [{"text": text}], "usage": {"completion_tokens": len(tokens)}}
    yield f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"


async def _batches(queue: "asyncio.Queue[Waiting]", complete: Complete) -> None:
    while True:
        for group in groups(await gather(queue)):
            first = group[0]
            prompts = [waiting.prompt for waiting in group]
            try:
                answers = await asyncio.to_thread(
                    complete, prompts, first.max_tokens, first.adapter
                )
            except RuntimeError as error:
                for waiting in group:
                    waiting.answer.set_exception(error)
                continue
            for waiting, tokens in zip(group, answers, strict=True):
                waiting.answer.set_result(tokens)


async def gather(queue: "asyncio.Queue[Waiting]") -> list[Waiting]:
    """What is there once it is quiet: at least one, at most `MAX_BATCH`."""
    found = [await queue.get()]
    while len(found) < MAX_BATCH:
        try:
            found.append(await asyncio.wait_for(queue.get(), _QUIET_S))
        except TimeoutError:
            break
    return found


def groups(batch: list[Waiting]) -> list[list[Waiting]]:
    """Those that can share a static batch: one adapter, equal lengths in and out."""
    found: dict[tuple[str | None, int, int], list[Waiting]] = {}
    for waiting in batch:
        key = (waiting.adapter, len(waiting.prompt), waiting.max_tokens)
        found.setdefault(key, []).append(waiting)
    return list(found.values())
