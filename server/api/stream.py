"""Server-sent events: models, or their JSON -> `data:` lines, and the response that carries them.

The status is sent with the first event, so later errors travel as an event and end the stream. The
response closes its source however it ends, also when it is dropped before its first event.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import unless_disconnected
from server.api.error_response import error_json, internal_error_json
from server.errors import FathomError

Item = TypeVar("Item")

log = structlog.get_logger(__name__)

LAST_READ_S = 30.0
"""How long a client may take to read the last of a stream that was made in time."""

DONE = b"data: [DONE]\n\n"


Chunk = BaseModel | bytes
"""One thing to send; bytes are its JSON already."""


def encode(json_text: str | bytes, event: str | None = None) -> bytes:
    """One event, with a name if it has one."""
    name = b"" if event is None else f"event: {event}\n".encode()
    data = json_text.encode() if isinstance(json_text, str) else json_text
    return name + b"data: " + data + b"\n\n"


class EventStream(Response):
    """A response of server-sent events that ends with `end`, or with an error event."""

    media_type = "text/event-stream"
    end = DONE

    def __init__(
        self,
        chunks: AsyncGenerator[Chunk, None],
        close: Callable[[], Awaitable[Any]],
        timeout_s: float | None = None,
    ) -> None:
        """timeout_s: after which a client that does not read what is sent is given up."""
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._chunks = chunks
        self._close = close
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, an error, or the client's leaving; then close the source."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await unless_disconnected(receive, self._send(send))
        except (ClientDisconnect, TimeoutError):
            pass  # an end of the response that is not sent closes the connection
        finally:
            await self._chunks.aclose()
            await self._close()

    def event(self, chunk: Chunk) -> bytes:
        """A chunk as it is sent."""
        if isinstance(chunk, bytes):
            return encode(chunk)
        return encode(chunk.model_dump_json(exclude_unset=True))

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield self.event(chunk)
        except FathomError as error:
            yield encode(error_json(error))
        except Exception:
            log.exception("a stream failed")
            yield encode(internal_error_json())
            raise
        else:
            if self.end:
                yield self.end


async def primed(
    source: AsyncGenerator[Item, None], receive: Receive
) -> AsyncGenerator[Item, None]:
    """`source` once its first item is there, so that what fails before it still has a status."""
    first = await unless_disconnected(receive, _first(source))

    async def resumed() -> AsyncGenerator[Item, None]:
        for item in first:
            yield item
        async for item in source:
            yield item

    return resumed()


async def _first(source: AsyncGenerator[Item, None]) -> list[Item]:
    async for item in source:
        return [item]
    return []
