"""One HTTP exchange, and the line that the access log has of it.

The line says who asked for what, how long it took and how it ended, never what was said: prompts and
completions are in it only where the operator asked for them.
"""

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import structlog
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from server.api.observation import Observation

if TYPE_CHECKING:
    from server.api.tracing import Tracing

log = structlog.get_logger(__name__)

PROBES = ("/health", "/ready", "/metrics", "/version")
"""Asked every few seconds by machines: logged at debug unless they fail."""
CONSOLE = "/console/"
"""Files of the console, many at once: logged like probes."""
MAX_PATH = 256
"""Characters of a path that a line repeats, percent-encoded: a terminal must not obey them."""


class Exchange:
    """What handlers find out about the exchange that they answer."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []
        """Its engine requests, one a prompt, once there are some."""
        self.error: str | None = None
        """The code of the error that it was answered with."""


def exchange_of(http: Request) -> Exchange:
    """The exchange of a request that came through the middleware."""
    exchange: Exchange = http.scope["state"]["exchange"]
    return exchange


class AccessLogMiddleware:
    """One line an exchange, when it has ended."""

    def __init__(
        self,
        app: ASGIApp,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        """tokenizer: reads prompts for the log; without it no text is logged."""
        self._app = app
        self._tokenizer = tokenizer
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Also for a client that left, and for a handler that failed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        exchange = Exchange()
        scope.setdefault("state", {})["exchange"] = exchange
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = status or 500
            exchange.error = exchange.error or "internal_error"
            raise
        finally:
            is_dull = scope["path"] in PROBES or scope["path"].startswith(CONSOLE)
            write = log.debug if is_dull and status < 400 else log.info
            duration_s = round(time.monotonic() - began_s, 6)
            write("request", **self._fields(scope, status, exchange), duration_s=duration_s)

    def _fields(self, scope: Scope, status: int, exchange: Exchange) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "request_id": scope["state"].get("request_id"),
            "method": scope["method"],
            "path": quote(scope["path"][:MAX_PATH], safe="/@:+,", errors="replace"),
            "status": status,
        }
        if self._tracing is not None:
            fields["trace_id"] = self._tracing.trace_id()
        if exchange.error is not None:
            fields["error"] = exchange.error
        if exchange.observations:
            fields |= _generation(exchange.observations)
            if self._tokenizer is not None:
                fields |= _texts(exchange.observations, self._tokenizer)
        return fields


def _generation(observations: list[Observation]) -> dict[str, Any]:
    lora = observations[0].request.lora
    outputs = [seen.last for seen in observations if seen.last is not None]
    firsts = [s.first_token_s - s.request.arrival_s for s in observations if s.first_token_s]
    reasons = {reason for seen in observations for reason in seen.finish_reasons}
    causes = {seen.cause for seen in observations if seen.cause}
    return {
        "response_id": observations[0].request.id.rpartition("-")[0],
        "adapter": None if lora.adapter is None else lora.adapter.name,
        "depth": lora.depth,
        "depth_source": lora.source,
        "prompt_tokens": sum(len(seen.request.prompt_token_ids) for seen in observations),
        "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "completion_tokens": sum(output.num_output_tokens for output in outputs),
        "finish": ",".join(sorted(causes or reasons)),
        "ttft_s": round(min(firsts), 6) if firsts else None,
    }


def _texts(
    observations: list[Observation], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[str]]:
    prompts = [tokenizer.decode(list(seen.request.prompt_token_ids)) for seen in observations]
    completions = [text for seen in observations for text in (seen.texts or {}).values()]
    return {"prompts": [str(prompt) for prompt in prompts], "completions": completions}
