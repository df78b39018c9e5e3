"""HTTP/1.1 with bounds that uvicorn's own protocol has not: a request's head, its time, and how many connect.

httptools collects a head for as long as it comes, so that one connection could fill the memory, or
be held for ever by a byte a minute. And of requests that were sent one after the other without waiting,
uvicorn tells only the last that its client has left. Knows no application but the paths of its probes;
used by `serve`.
"""

import asyncio
import json
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

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
_NO_HTTP = _refusal(
    b"400 Bad Request",
    "invalid_request_error",
    "invalid_http",
    "what was sent is no HTTP/1.1 request",
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
        self._unanswered: deque[RequestResponseCycle] = deque()
        """Requests in the order in which they came; the first is being answered."""

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
        self._desert()
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
            self._unanswered.append(self.cycle)
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

    def on_response_complete(self) -> None:
        """A request has its answer; the next in line is begun."""
        self._unanswered.popleft()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP: said in the shape of all errors."""
        self._refuse(_NO_HTTP)

    def _refuse_surplus(self) -> None:
        self._all.num_refused += 1
        self._refuse(_full(self._all.most))

    def _refuse(self, answer: bytes) -> None:
        """Answer, and let the rest come for a while: closed at once, the answer would be lost to it."""
        self._is_refused = True
        self._stop_timer()
        if self._unanswered:
            cycle = self._unanswered[0]
            is_its_own = len(self._unanswered) == 1 and cycle.more_body
            if not is_its_own or cycle.response_started:
                self._give_up()  # it would be taken for another's answer, or be in the middle of one
                return
            self._desert()
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
        self._desert()
        self.transport.close()

    def _desert(self) -> None:
        """Tell whoever answers on this connection that nobody listens any more."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
