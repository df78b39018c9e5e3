"""A thread that sees a step which does not end.

It counts its own wake-ups during one step and not the clock's seconds, so that a process that was
paused, and found its step as old as the pause, is not taken for stuck. A step that holds Python's own lock
holds this thread too: that can be seen only from outside, by a `/health` that does not answer.
"""

import math
from collections.abc import Callable
from threading import Event, Thread

MAX_INTERVAL_S = 1.0
MIN_TICKS = 20
"""So often at least it looks at a step before it calls it stuck."""


class Watchdog:
    """Calls `on_stuck` once, from its own thread, when a step takes longer than `timeout_s`."""

    def __init__(self, timeout_s: float, on_stuck: Callable[[], None]) -> None:
        self.timeout_s = timeout_s
        self._interval_s = min(MAX_INTERVAL_S, timeout_s / MIN_TICKS)
        self._num_ticks_allowed = math.ceil(timeout_s / self._interval_s)
        self._on_stuck = on_stuck
        self._num_steps = 0
        self._is_in_step = False
        self._seen = -1
        self._num_ticks = 0
        self._is_over = Event()
        self._thread = Thread(target=self._run, name="fathom-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End, soon."""
        self._is_over.set()

    def step_begins(self) -> None:
        """Told by the watched thread."""
        self._num_steps += 1
        self._is_in_step = True

    def step_ends(self) -> None:
        """Told by the watched thread; until it is told of another step there is nothing to watch."""
        self._is_in_step = False

    def tick(self) -> bool:
        """Look once; whether the same step has been seen too often."""
        step = self._num_steps if self._is_in_step else -1
        if step != self._seen or step == -1:
            self._seen, self._num_ticks = step, 0
            return False
        self._num_ticks += 1
        return self._num_ticks > self._num_ticks_allowed

    def _run(self) -> None:
        while not self._is_over.wait(self._interval_s):
            if self.tick():
                self._on_stuck()
                return
