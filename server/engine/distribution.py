"""How often a figure fell into which range: written by one thread, read by whoever is asked for metrics.

Cheaper than a metrics library's histogram because nobody locks: one thread alone observes, and a
reader copies the counts at once. What it reads may be one observation ahead of the total.
"""

from bisect import bisect_left


class Distribution:
    """Counts of observations by range, and their sum."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """bounds: upper ends of the ranges, ascending, each inclusive; the last range has none."""
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one figure."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def counts(self) -> tuple[int, ...]:
        """Observations in each range, the one without an upper end last."""
        return tuple(self._counts)
