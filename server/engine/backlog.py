"""Requests that wait to be admitted: how many tokens they may come to, and since when they wait.

Event loops let requests in; the engine's thread lets them go as it admits or ends them, and asks which
have waited too long. Those that run are none of its business.
"""

import time
from collections.abc import Callable
from threading import Lock

from server.engine.request import Request
from server.errors import QueueFull


class Backlog:
    """Bounded in tokens and in time."""

    def __init__(
        self,
        max_tokens: int | None = None,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None: no such bound."""
        self.timeout_s = timeout_s
        self._max_tokens = max_tokens
        self._clock = clock
        self._lock = Lock()
        self._num_tokens = 0
        self._waiting: dict[str, tuple[int, float]] = {}
        """Tokens, and when it came; in order of arrival."""

    @property
    def num_tokens(self) -> int:
        """What all that wait may come to."""
        return self._num_tokens

    def enter(self, request: Request) -> None:
        """Begin to wait. Raises QueueFull where too much waits already, but never of an empty queue."""
        sampling = request.sampling
        num_tokens = len(request.prompt_token_ids) + sampling.n * sampling.max_tokens
        with self._lock:
            is_over = (
                self._max_tokens is not None and self._num_tokens + num_tokens > self._max_tokens
            )
            if self._waiting and is_over:
                raise QueueFull(
                    f"{self._num_tokens} tokens of prompts and max_tokens are waiting; with this "
                    f"request's {num_tokens} they would be over the limit of {self._max_tokens}"
                )
            self._waiting[request.id] = (num_tokens, self._clock())
            self._num_tokens += num_tokens

    def leave(self, request_id: str) -> None:
        """Wait no more, for whatever reason. Idempotent."""
        with self._lock:
            num_tokens, _ = self._waiting.pop(request_id, (0, 0.0))
            self._num_tokens -= num_tokens

    def overdue(self) -> list[str]:
        """Requests that have waited longer than they may, the longest first."""
        if self.timeout_s is None or not self._waiting:
            return []
        late = self._clock() - self.timeout_s
        found = []
        with self._lock:
            for request_id, (_, came) in self._waiting.items():
                if came > late:
                    break
                found.append(request_id)
        return found
