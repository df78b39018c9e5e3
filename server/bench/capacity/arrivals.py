"""When requests come, how long they are, and which adapter each wants: of a day, or of a trace.

Arrivals are a Poisson process whose rate follows the day and may burst (thinning, Lewis and Shedler 1979).
Adapters are drawn by Zipf's law. Everything comes from one seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from server.bench.mix import Choice
from server.bench.trace import TraceRow
from server.bench.workload import Lengths, Workload

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Burst:
    """So many times the rate, from `start_s` on for `duration_s`."""

    start_s: float
    duration_s: float
    factor: float


@dataclass(frozen=True, slots=True)
class Day:
    """Requests a second through a day: a cosine about the mean, highest at `peak_s`.

    peak: the highest rate over the mean, from 1 (always the same) to 2 (nothing at night).
    """

    mean_per_s: float
    peak: float = 1.0
    peak_s: float = DAY_S * 15 / 24
    burst: Burst | None = None

    def rate(self, at_s: float) -> float:
        """Requests a second at a time of the day."""
        swing = (self.peak - 1) * math.cos(2 * math.pi * (at_s - self.peak_s) / DAY_S)
        rate = self.mean_per_s * (1 + swing)
        burst = self.burst
        if burst is not None and 0 <= at_s - burst.start_s < burst.duration_s:
            rate *= burst.factor
        return rate

    @property
    def highest(self) -> float:
        """No rate is above it."""
        return self.mean_per_s * self.peak * max(1.0, self.burst.factor if self.burst else 1.0)

    def arrivals(self, start_s: float, duration_s: float, random: Random) -> list[float]:
        """Times of arrival within a part of the day, counted from its start."""
        found: list[float] = []
        at_s = 0.0
        while True:
            at_s += random.expovariate(self.highest)
            if at_s >= duration_s:
                return found
            if random.random() * self.highest < self.rate(start_s + at_s):
                found.append(at_s)


@dataclass(frozen=True, slots=True)
class Zipf:
    """Of `num_adapters`, the n-th is asked for `n ** -exponent` as often as the first. 0: all alike."""

    num_adapters: int
    exponent: float

    @property
    def shares(self) -> list[float]:
        """Of all requests, by rank; they sum to 1."""
        weights = [rank**-self.exponent for rank in range(1, self.num_adapters + 1)]
        total = sum(weights)
        return [weight / total for weight in weights]

    def draw(self, num_requests: int, random: Random) -> list[int]:
        """Adapters by rank, from 0."""
        return random.choices(
            range(self.num_adapters), cum_weights=list(accumulate(self.shares)), k=num_requests
        )


def adapter_name(index: int) -> str:
    """As `fathom bench` names its random adapters."""
    return f"a{index}"


def day_rows(
    day: Day, start_s: float, duration_s: float, prompt: Lengths, output: Lengths, seed: int
) -> list[TraceRow]:
    """Requests of a part of the day, as a trace has them."""
    times = day.arrivals(start_s, duration_s, Random(f"{seed}/arrivals"))
    random = Random(f"{seed}/lengths")
    return [TraceRow(at_s, prompt.draw(random), output.draw(random)) for at_s in times]


def zipf_workload(
    rows: Sequence[TraceRow], zipf: Zipf, depth: int | None, vocab_size: int, seed: int
) -> Workload:
    """An adapter for each row, all of them to the same depth (None: whole)."""
    drawn = zipf.draw(len(rows), Random(f"{seed}/adapters"))
    choices = tuple(Choice(adapter_name(index), depth) for index in drawn)
    return Workload(tuple(rows), choices, vocab_size, seed)
