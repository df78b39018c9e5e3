"""HTTP/1.1 with bounds that uvicorn's own protocol has not: a request's head, its time, and how many connect.

httptools collects a head for as long as it comes, so that one connection could fill the memory, or
be held for ever by a byte a minute. Knows no application but the paths of its probes; used by `serve`.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.security_headers import HEADERS
from server.connections import Connections

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers; browsers and proxies send 16 KB at the most."""
HEAD_TIMEOUT_S = 30.0
"""From the connection, or from a head's first byte, to its end."""

LINGER_S = 5.0
"""How long a client that is refused may take to ask, and then go on sending to nobody."""

PROBES = (b"/health", b"/ready", b"/version", b"/metrics")
"""Answered beyond the bound of connections: whoever restarts a server that is full makes it worse."""


def _refusal(status: bytes, error_type: str, code: str, message: str, **headers: str) -> bytes:
    """A whole response in OpenAI's shape, after which the connection is closed."""
    error = {"message": message, "type": error_type, "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    said = HEADERS | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    return b"HTTP/1.1 %b\r\n%b\r\n%b" % (status, lines.encode(), body)


_TOO_LARGE = _refusal(
    b"431 Request Header Fields Too Large",
    "invalid_request_error",
    "headers_too_large",
    f"request line and headers are over the limit of {MAX_HEAD_BYTES} bytes",
)


def _full(most: int) -> bytes:
    return _refusal(
        b"503 Service Unavailable",
        "overloaded_error",
        "too_many_connections",
        f"the server has the {most} connections that it may have; try again soon",
        retry_after="1",
    )


class BoundedHttpProtocol(HttpToolsProtocol):
    """One of `connections`."""

    def __init__(self, *args: Any, connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._all = connections
        self._is_in_head = False
        self._num_head_bytes = 0
        """Of a head that has not ended."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_surplus = False
        """It is beyond the bound: probes alone are answered, and it is closed."""
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and should say what it wants."""
        super().connection_made(transport)
        if self._all.join(self):
            self._start_timer()
            return
        self._is_surplus = True
        if self._all.may_linger:
            # Refused once it has asked: many clients do not look for an answer before.
            self._head_timer = self.loop.call_later(LINGER_S, self._refuse_surplus)
        else:
            self._all.num_refused += 1
            self._is_refused = True
            transport.write(_full(self._all.most))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        self._all.leave(self)
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
            self._refuse(_TOO_LARGE)
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
            self._refuse(_TOO_LARGE)
        elif self._is_surplus and self.url.partition(b"?")[0] not in PROBES:
            self._refuse_surplus()
        if not self._is_refused:
            super().on_headers_complete()
            if self._is_surplus:
                self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A part of a request's body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has been read."""
        if not self._is_refused:
            super().on_message_complete()

    def _refuse_surplus(self) -> None:
        self._all.num_refused += 1
        self._refuse(_full(self._all.most))

    def _refuse(self, answer: bytes) -> None:
        """Answer, and let the rest come for a while: closed at once, the answer would be lost to it."""
        self._is_refused = True
        self._stop_timer()
        self.transport.write(answer)
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
