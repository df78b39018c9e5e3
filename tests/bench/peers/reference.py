"""A fixed piece of work that says how fast the machine is just now, and the rule that judges by it.

The rule, fixed before anything was measured: a sample stands between two reference runs and is
discarded if they differ by more than 15 % of the faster one, or if either is more than 25 % off the
median of all reference runs so far. A discarded sample is measured again, at most `tries` times in
all; after that the round has no number for that peer in that case.
"""

import time
from collections.abc import Sequence
from statistics import median

import torch

MAX_DIFFERENCE = 0.15
MAX_OFF_MEDIAN = 0.25
_NUM_MATMULS = 16
_NUM_COPIES = 8
_COPY_BYTES = 1 << 26
_NUM_FIRST = 9


class Reference:
    """Reference runs of one bench: `history` in seconds, each about a third of one on two cores."""

    def __init__(self) -> None:
        self.history: list[float] = []
        self._left = torch.ones(768, 768)
        self._right = torch.ones(768, 2048)
        self._source = torch.ones(_COPY_BYTES // 4)
        self._target = torch.empty_like(self._source)

    def first(self) -> None:
        """Enough runs for a median; the very first, which touches the memory, is not kept."""
        for _ in range(_NUM_FIRST + 1):
            self.run()
        del self.history[0]

    def run(self) -> float:
        """One run: matrix products, then copies of memory that no cache holds."""
        started_s = time.perf_counter()
        for _ in range(_NUM_MATMULS):
            torch.mm(self._left, self._right)
        for _ in range(_NUM_COPIES):
            self._target.copy_(self._source)
        taken_s = time.perf_counter() - started_s
        self.history.append(taken_s)
        return taken_s


def is_disturbed(before_s: float, after_s: float, history: Sequence[float]) -> bool:
    """The rule of this module's docstring."""
    typical_s = median(history)
    fast_s, slow_s = sorted((before_s, after_s))
    off = max(abs(run_s - typical_s) for run_s in (before_s, after_s))
    return slow_s > fast_s * (1 + MAX_DIFFERENCE) or off > typical_s * MAX_OFF_MEDIAN
