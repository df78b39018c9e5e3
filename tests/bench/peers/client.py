"""The one asynchronous client that all servers meet: `load.Client` over a dialect's stream.

Keeps every request's tokens by its prompt, which no two requests of a run share, so that the check
and the timing see the same thing.
"""

import json
from collections.abc import AsyncIterator
from types import TracebackType

import httpx2

from server.bench.load import Counters, Piece, RequestFailed
from server.bench.workload import WorkItem
from tests.bench.peers.dialects import Dialect

_CONNECT_TIMEOUT_S = 10.0
_TIMEOUT_S = 300.0
"""Between two messages; a server that says nothing for so long has failed."""


class PeerClient:
    """Entered with `async with`. `transport` is for tests."""

    def __init__(
        self, url: str, dialect: Dialect, *, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self._dialect = dialect
        self.completions: dict[tuple[int, ...], list[int]] = {}
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers={"Connection": "close"} if dialect.has_new_connections else {},
            timeout=httpx2.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> "PeerClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def stream(self, item: WorkItem) -> AsyncIterator[Piece]:
        """See `load.Client.stream`."""
        tokens = self.completions[item.prompt] = []
        dialect = self._dialect
        try:
            async with self._http.stream("POST", dialect.path, json=dialect.body(item)) as response:
                if response.status_code != 200:
                    text = (await response.aread())[:300].decode(errors="replace")
                    raise RequestFailed(f"{response.status_code}: {text}")
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        event = dialect.read(json.loads(line.removeprefix("data: ")))
                        if event.error is not None:
                            raise RequestFailed(event.error)
                        tokens.extend(event.tokens)
                        yield Piece(len(event.tokens), event.num_output_tokens)
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error

    async def counters(self) -> Counters | None:
        """No peer's counters are read."""
        return None
