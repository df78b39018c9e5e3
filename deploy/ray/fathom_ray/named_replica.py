"""Says on every response which replica made it, as Ray's logs and dashboard name it."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-fathom-replica"


class NamedReplicaMiddleware:
    """Pure ASGI, so that streams pass as they come."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the header when the response starts."""

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = self._name
            await send(message)

        await self._app(scope, receive, send_named if scope["type"] == "http" else send)
