"""Tells a client that its replica was lost, where Serve's proxy only closes the connection.

A replica that dies has its requests with it. None is sent again by itself: a stream may have been read
in part, and a request that kills a replica would go on to the next. So the client is told in the shape of
all other errors, and may ask again.
"""

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_response import error_json
from server.api.stream import encode
from server.errors import Overloaded


class ReplicaLost(Overloaded):
    """The process that had a request is gone; another will take it."""

    code = "replica_lost"


ERROR = ReplicaLost("the replica that had this request was lost before its end; ask again")


class LostReplicaMiddleware:
    """Ends what the application leaves open: a response that did not begin, or a stream of events."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, watch, and say what is missing."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = has_ended = is_stream = False

        async def watched(message: Message) -> None:
            nonlocal has_begun, has_ended, is_stream
            if message["type"] == "http.response.start":
                has_begun = True
                is_stream = any(
                    key.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for key, value in message.get("headers", ())
                )
            elif message["type"] == "http.response.body":
                has_ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        if not has_begun:
            response = Response(
                error_json(ERROR),
                ERROR.status,
                {"retry-after": str(ERROR.retry_after_s)},
                "application/json",
            )
            await response(scope, receive, send)
        elif is_stream and not has_ended:
            await send({"type": "http.response.body", "body": encode(error_json(ERROR))})
