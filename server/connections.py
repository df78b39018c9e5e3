"""The connections of one server: counted, bounded, and let go when nobody reads what is left of them.

Beyond the bound a few more are let in, for as long as it takes to tell them so, and to answer probes:
a server with no room is not a server that is dead. Whoever comes beyond those is closed with the same
answer at once. Knows no HTTP; `http_protocol` asks it, `serve` looks after it, `/metrics` shows it.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol, Self

import structlog

from server.config import ConfigError, flag

log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 16_384
"""Where the settings name no number."""
RESERVED_FILES = 512
"""For all that is no connection: weights, the database, the log."""
SURPLUS_SHARE = 4
"""One in so many of the reserved files is for connections beyond the bound, each for seconds."""
FLUSH_S = 30.0
"""How long a closed connection may keep what its client does not read."""


class Connection(Protocol):
    """What is asked of one."""

    transport: asyncio.Transport


class Connections:
    """Belongs to the event loop; its numbers may be read from any thread."""

    def __init__(self, most: int, max_surplus: int) -> None:
        self.most = most
        """That are served at once."""
        self._max_surplus = max_surplus
        self.num_refused = 0
        self._served: set[Connection] = set()
        self._surplus: set[Connection] = set()
        self._closing_since: dict[Connection, float] = {}
        self._num_told = 0

    @classmethod
    def within(cls, raise_limit: Callable[[int], int], max_connections: int | None) -> Self:
        """As many as the settings name; where they name none, as many as fit and are of use.

        raise_limit: raises the limit on open files to the number given, or says how near it came.
        Raises ConfigError where a number that was named does not fit: it is not lowered.
        """
        limit = raise_limit((max_connections or MAX_CONNECTIONS) + RESERVED_FILES)
        # A limit that is very low is shared: a server of few connections is better than none.
        reserved = min(RESERVED_FILES, limit // 2)
        room = limit - reserved
        if max_connections is not None and max_connections > room:
            raise ConfigError(
                f"{flag('max_connections')}: {max_connections} do not fit: this process may open"
                f" {limit} files, which is room for {room} connections; raise the hard limit"
                " (ulimit -Hn, LimitNOFILE=)"
            )
        if max_connections is None and room < MAX_CONNECTIONS:
            log.info("open files limit the connections", open_files=limit, max_connections=room)
        return cls(max_connections or min(MAX_CONNECTIONS, room), reserved // SURPLUS_SHARE)

    @property
    def num_open(self) -> int:
        """Every one that holds a file, those that are being refused too."""
        return len(self._served) + len(self._surplus)

    def join(self, connection: Connection) -> bool:
        """Whether a new one is within the bound."""
        is_within = len(self._served) < self.most
        (self._served if is_within else self._surplus).add(connection)
        return is_within

    @property
    def may_linger(self) -> bool:
        """Whether one beyond the bound, which has joined, may be listened to."""
        return len(self._surplus) <= self._max_surplus

    def leave(self, connection: Connection) -> None:
        """It is closed, and its file is free."""
        self._served.discard(connection)
        self._surplus.discard(connection)
        self._closing_since.pop(connection, None)

    def look_after(self) -> None:
        """Called every few seconds: give up on clients that never read, and tell the log of refusals."""
        now = time.monotonic()
        for connection in [*self._served, *self._surplus]:
            if not connection.transport.is_closing():
                continue
            if now - self._closing_since.setdefault(connection, now) > FLUSH_S:
                connection.transport.abort()
        if self.num_refused > self._num_told:
            log.warning(
                "connections were refused",
                num_refused=self.num_refused - self._num_told,
                num_open=self.num_open,
                max_connections=self.most,
            )
            self._num_told = self.num_refused
