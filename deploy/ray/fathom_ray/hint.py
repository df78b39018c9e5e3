"""Reads which adapter a request asks for and tells the router, by the header that Serve looks at.

It is a hint: what the request gets is settled by the replica, which reads the same body. A body that is
large, slow or no JSON passes without one, and so does one whose client set the header itself.
"""

import asyncio
import json
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"serve-multiplexed-model-id"

PATHS = ("/v1/completions", "/v1/chat/completions")

MAX_HINT_BYTES = 1 << 20
"""Of a body that is read for its model: the proxy's loop parses a megabyte in some milliseconds."""

PATIENCE_S = 5.0
"""After so long without the whole body, the replica reads the rest, and has limits of its own."""


class HintMiddleware:
    """Pure ASGI: keeps what it has read and gives it to the application as if it came then."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the header where it can be told."""
        if not _is_asked(scope):
            await self._app(scope, receive, send)
            return
        read: list[Message] = []
        name = adapter_name(b"".join(await _body(receive, read)))
        if name:
            scope = {**scope, "headers": [*scope["headers"], (HEADER, name.encode())]}
        replay = iter(read)

        async def receive_again() -> Message:
            for message in replay:
                return message
            return await receive()

        await self._app(scope, receive_again, send)


def adapter_name(body: bytes) -> str:
    """The part of a request's `model` that names an adapter; empty where it cannot be told."""
    try:
        model = json.loads(body)["model"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    if not isinstance(model, str):
        return ""
    name = model.partition("@")[0]
    return name if name.isprintable() and len(name) <= 256 else ""


def _is_asked(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and scope["path"] in PATHS
        and all(key.replace(b"_", b"-") != HEADER for key, _ in scope["headers"])
    )


async def _body(receive: Receive, read: list[Message]) -> Iterable[bytes]:
    """The whole body, or nothing; every message that was received is added to `read`."""
    num_bytes = 0
    try:
        async with asyncio.timeout(PATIENCE_S):
            while num_bytes <= MAX_HINT_BYTES:
                message = await receive()
                read.append(message)
                if message["type"] != "http.request":
                    return ()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return (m.get("body", b"") for m in read)
    except TimeoutError:
        pass
    return ()
