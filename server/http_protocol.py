"""HTTP/1.1 with bounds that uvicorn's own protocol has not: the size of a request's head, and its time.

httptools collects a head for as long as it comes, so that one connection could fill the memory, or
be held for ever by a byte a minute. Knows no application; used by `serve`.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers; browsers and proxies send 16 KB at the most."""
HEAD_TIMEOUT_S = 30.0
"""From the connection, or from a head's first byte, to its end."""

LINGER_S = 5.0
"""How long a client that was refused may go on sending, to nobody."""

_TOO_LARGE = json.dumps(
    {
        "error": {
            "message": f"request line and headers are over the limit of {MAX_HEAD_BYTES} bytes",
            "type": "invalid_request_error",
            "param": None,
            "code": "headers_too_large",
        }
    }
).encode()
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"x-content-type-options: nosniff\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
    % (len(_TOO_LARGE), _TOO_LARGE)
)


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = False
        self._num_head_bytes = 0
        """Of a head that has not ended."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and should say what it wants."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and count it if all of it is head."""
        if self._is_refused:
            return
        was_in_head = self._is_in_head
        super().data_received(data)
        if not self._is_in_head or self._is_refused or self.transport.is_closing():
            return
        self._num_head_bytes += len(data) if was_in_head else 0
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse()
        elif self._head_timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        self._is_in_head = True
        self._num_head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head has ended: its request begins, unless it was too large."""
        self._is_in_head = False
        self._stop_timer()
        lines = sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)
        if len(self.url) + lines > MAX_HEAD_BYTES:
            self._refuse()
        if not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a request's body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has been read."""
        if not self._is_refused:
            super().on_message_complete()

    def _refuse(self) -> None:
        """Answer, and let the rest come for a while: closed at once, the answer would be lost to it."""
        self._is_refused = True
        self._stop_timer()
        self.transport.write(_REFUSAL)
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(LINGER_S, self._give_up)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.close()
