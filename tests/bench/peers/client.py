"""The one asynchronous client that all servers meet: `load.Client` over a dialect's stream.

Keeps every request's tokens by its prompt, which no two requests of a run share, so that the check
and the timing see the same thing. It shares the cores with the server that it times, which waits for what a
token takes here: hence aiohttp, which parses in C, and all that has come read at once (0.38 to 0.21 s of
processor time for 2,048 tokens, with uvloop around it).
"""

import json
from collections.abc import AsyncIterator
from types import TracebackType

import aiohttp

from server.bench.load import Counters, Piece, RequestFailed
from server.bench.workload import WorkItem
from tests.bench.peers.dialects import Dialect

_CONNECT_TIMEOUT_S = 10.0
_TIMEOUT_S = 300.0
"""Between two messages; a server that says nothing for so long has failed."""
_DATA = b"data: "
_DONE = b"[DONE]"


async def _messages(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events, however they are cut into pieces on their way."""
    rest = b""
    async for received in stream.iter_any():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(_DATA) and (data := line[len(_DATA) :].strip()) != _DONE:
                yield data


class PeerClient:
    """Entered with `async with`."""

    def __init__(self, url: str, dialect: Dialect) -> None:
        self._url = url
        self._dialect = dialect
        self.completions: dict[tuple[int, ...], list[int]] = {}

    async def __aenter__(self) -> "PeerClient":
        self._http = aiohttp.ClientSession(
            self._url,
            connector=aiohttp.TCPConnector(limit=0, force_close=self._dialect.has_new_connections),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_TIMEOUT_S
            ),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.close()

    async def stream(self, item: WorkItem) -> AsyncIterator[Piece]:
        """See `load.Client.stream`."""
        tokens = self.completions[item.prompt] = []
        dialect = self._dialect
        try:
            async with self._http.post(dialect.path, json=dialect.body(item)) as response:
                if response.status != 200:
                    raise RequestFailed(f"{response.status}: {(await response.text())[:300]}")
                async for message in _messages(response.content):
                    event = dialect.read(json.loads(message))
                    if event.error is not None:
                        raise RequestFailed(event.error)
                    tokens.extend(event.tokens)
                    yield Piece(len(event.tokens), event.num_output_tokens)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error

    async def counters(self) -> Counters | None:
        """No peer's counters are read."""
        return None
