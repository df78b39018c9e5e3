"""Bounds on one fetch that hold while it runs: how many bytes come, and until when.

What a server said of a file's size was believed once; here what really comes is counted. Told on
the fetching thread of every piece, and to give up by any other.
"""

import time
from threading import Event

from server.errors import AdapterError, SourceUnavailable


class Meter:
    """Counts one fetch's bytes; `add` raises when it must end."""

    def __init__(self, what: str, max_bytes: int, timeout_s: float) -> None:
        self._what = what
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._ends_s = time.monotonic() + timeout_s
        self._is_given_up = Event()
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count a piece. Raises AdapterError for one too many, SourceUnavailable when time is over."""
        self.num_bytes += num_bytes
        if self.num_bytes > self._max_bytes:
            raise AdapterError(
                f"{self._what}: more than {self._max_bytes} bytes came, which is more than was announced"
            )
        if self._is_given_up.is_set() or time.monotonic() > self._ends_s:
            raise self.overdue()

    def expect(self, num_bytes: int) -> None:
        """So many bytes were announced, and no more may come. Called before the first comes."""
        self._max_bytes = num_bytes

    def give_up(self) -> None:
        """Let the next piece be the last: nobody waits for them any more."""
        self._is_given_up.set()

    def overdue(self) -> SourceUnavailable:
        """What is said when time is over."""
        return SourceUnavailable(
            f"{self._what}: not fetched within fetch_timeout_s, {self._timeout_s:g} seconds"
        )
