"""`x-request-id`: the client's own if it sent one, else a new one; on every response.

It labels the HTTP exchange for support, and whatever is logged meanwhile. The engine's request ids are
made by the server, because two clients may send the same label.
"""

import re
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_response import error_json
from server.errors import BadRequest

_LABEL = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIdMiddleware:
    """Accepts and echoes `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses a label that could break a header or a log line."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        request_id = given if given and _LABEL.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if given is None or given == request_id:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                await self._app(scope, receive, send_labelled)
            return
        error = BadRequest(
            "'x-request-id' must be 1 to 128 visible ASCII characters "
            f"(got {len(given)} characters)",
            param="x-request-id",
        )
        refusal = Response(error_json(error), error.status, media_type="application/json")
        await refusal(scope, receive, send_labelled)
