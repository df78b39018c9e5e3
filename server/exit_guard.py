"""The process ends when it has to, whatever hangs in it.

A device that is lost, a step that is stuck and a thread that holds an event loop can each keep a process
from ending in good order. So a thread of its own looks at the time, and ends the process, status 1, once
it is overdue. A supervisor restarts it then; one that stayed would be there and serve nobody.
"""

import math
import os
import time
from collections.abc import Callable
from threading import Event, Thread

import structlog

log = structlog.get_logger(__name__)

EXIT_S = 10.0
"""How long a process may take to end once it has nothing more to do."""

INTERVAL_S = 0.25


class ExitGuard:
    """Ends the process at its deadline, which it has from when the engine is dead, or is told."""

    def __init__(
        self,
        is_engine_alive: Callable[[], bool],
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_engine_alive = is_engine_alive
        self._end = end
        self._clock = clock
        self._deadline = math.inf
        self._is_over = Event()
        Thread(target=self._run, name="fathom-exit-guard", daemon=True).start()

    def end_within(self, seconds: float) -> None:
        """Have ended so long from now, or sooner if that was said before. A signal handler may call it."""
        self._deadline = min(self._deadline, self._clock() + seconds)

    def stop(self) -> None:
        """The process ends by itself."""
        self._is_over.set()

    def look(self) -> None:
        """Is it time?"""
        if not self._is_engine_alive():
            self.end_within(EXIT_S)
        if self._clock() >= self._deadline:
            log.error("the process did not end by itself and is ended")
            self._end(1)
            self.stop()

    def _run(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            self.look()
