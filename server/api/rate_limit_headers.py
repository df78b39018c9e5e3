"""OpenAI's `x-ratelimit-*` headers, on every response to a key that has limits.

They tell what is left when the response begins: this request is counted, and of its tokens those that
are reserved for a stream, or that a whole answer used. `reset` is when the whole allowance is back.
"""

import math

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.rate_limits import Bucket, KeyRates


class RateLimitHeadersMiddleware:
    """Adds the headers where a guard has left the sender's buckets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Looks when the response begins: what the sender is, is known only then."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                rates = scope.get("state", {}).get("rates")
                if isinstance(rates, KeyRates):
                    _write(MutableHeaders(scope=message), rates)
            await send(message)

        await self._app(scope, receive, send_with_limits if scope["type"] == "http" else send)


def _write(headers: MutableHeaders, rates: KeyRates) -> None:
    for unit, bucket in (("requests", rates.requests), ("tokens", rates.tokens)):
        if bucket is not None:
            headers[f"x-ratelimit-limit-{unit}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{unit}"] = str(max(0, math.floor(bucket.level)))
            headers[f"x-ratelimit-reset-{unit}"] = _duration(bucket)


def _duration(bucket: Bucket) -> str:
    """As OpenAI writes one and Go reads it, such as `1.5s`."""
    return f"{math.ceil(bucket.wait_s(bucket.limit) * 1000) / 1000:g}s"
