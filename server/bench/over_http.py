"""A client of a server over HTTP: OpenAI's completions, streamed, with token ids as the prompt.

A latency is between two events that carry text, which is what a user of the stream can see; an engine
that holds back a partial character shows a longer gap here than in process.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2

from server.bench.load import Counters, Piece, RequestFailed
from server.bench.workload import WorkItem
from server.config import ConfigError

_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServedModels:
    """What a server says that it serves."""

    base: str
    adapters: tuple[str, ...]
    max_model_len: int


class HttpClient:
    """`load.Client` over one server, entered with `async with`. `transport` is for tests."""

    def __init__(
        self,
        url: str,
        base: str = "",
        *,
        api_key: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._base = base
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            # Under load an answer may take as long as it takes: that is what is measured.
            timeout=httpx2.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> "HttpClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def models(self) -> ServedModels:
        """The base model, its adapters and its limit. Raises ConfigError where no Fathom answers."""
        try:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            base, *adapters = response.json()["data"]
            names = tuple(str(card["id"]) for card in adapters)
            return ServedModels(str(base["id"]), names, int(base["max_model_len"]))
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--url: {self._http.base_url} is no Fathom server: {error}"
            ) from None

    async def stream(self, item: WorkItem) -> AsyncIterator[Piece]:
        """See `load.Client.stream`."""
        try:
            async with self._http.stream(
                "POST", "/v1/completions", json=self.body(item)
            ) as response:
                if response.status_code != 200:
                    raise RequestFailed(_error_message(await response.aread()))
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _piece(json.loads(line.removeprefix("data: ")))
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error

    def body(self, item: WorkItem) -> dict[str, Any]:
        """An item on the wire."""
        adapter = item.choice.adapter
        body: dict[str, Any] = {
            "model": self._base if adapter is None else adapter,
            "prompt": list(item.prompt),
            "max_tokens": item.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if adapter is not None:
            body["lora_depth"] = "full" if item.choice.depth is None else item.choice.depth
        return body

    async def counters(self) -> Counters | None:
        """A server's counters are not read: other clients may share it."""
        return None


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise RequestFailed(str(event["error"].get("message")))
    usage = event.get("usage")
    has_text = any(choice["text"] for choice in event["choices"])
    if usage is None:
        return Piece(num_tokens=int(has_text))
    details = usage.get("prompt_tokens_details") or {}
    return Piece(int(has_text), usage["completion_tokens"], details.get("cached_tokens"))


def _error_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
