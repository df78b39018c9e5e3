"""What every response tells a browser: guess no type, frame nothing, send no referrer, keep nothing.

Answers of this server are data. What a browser must not do with them is said on each, errors too; a
route that says otherwise for itself is left as it is.
"""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",  # the same for what is older than frame-ancestors
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # Prompts and answers, keys' names, what is loaded: nothing that a cache should have.
    "cache-control": "no-store",
}


class SecurityHeadersMiddleware:
    """Adds `HEADERS` that a response has not set itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every HTTP response that passes."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_guarded if scope["type"] == "http" else send)
