"""The requests of one run: prompts, lengths, arrivals, and what each asks for.

Everything comes from one seed and the run's number. Each run has prompts of its own, since the
prefix cache would answer a repeated one; lengths, arrivals and choices are the same in every run.
Prompts are random token ids: how long a step takes does not depend on what the tokens say.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from server.bench.mix import Choice, Mix, deal
from server.bench.trace import TraceRow
from server.config import ConfigError


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request to be sent; every completion is exactly `output_len` tokens long."""

    prompt: tuple[int, ...]
    output_len: int
    choice: Choice
    arrival_s: float = 0.0
    """Seconds after the run's start; a closed loop does not look at it."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Uniform from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, random: Random) -> int:
        """One length."""
        return random.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Workload:
    """A recipe for runs of equal shape."""

    rows: tuple[TraceRow, ...]
    choices: tuple[Choice, ...]
    vocab_size: int
    seed: int

    @property
    def max_len(self) -> int:
        """The longest prompt with its completion."""
        return max(row.prompt_len + row.output_len for row in self.rows)

    def run(self, number: int) -> list[WorkItem]:
        """The items of run `number`; equal numbers give equal items."""
        random = Random(f"{self.seed}/prompts/{number}")
        return [
            WorkItem(
                tuple(random.randrange(self.vocab_size) for _ in range(row.prompt_len)),
                row.output_len,
                choice,
                row.arrival_s,
            )
            for row, choice in zip(self.rows, self.choices, strict=True)
        ]


def make_workload(rows: Sequence[TraceRow], mix: Mix, vocab_size: int, seed: int) -> Workload:
    """Deal the mix out over rows."""
    choices = deal(mix, len(rows), Random(f"{seed}/mix"))
    return Workload(tuple(rows), tuple(choices), vocab_size, seed)


def draw_rows(
    prompt_len: Lengths, output_len: Lengths, num_requests: int, rate: float | None, seed: int
) -> list[TraceRow]:
    """Rows as a trace has them, with Poisson arrivals where there is a rate."""
    random = Random(f"{seed}/lengths")
    lengths = [(prompt_len.draw(random), output_len.draw(random)) for _ in range(num_requests)]
    arrivals = poisson(rate, num_requests, seed) if rate is not None else [0.0] * num_requests
    return [TraceRow(arrival, *pair) for arrival, pair in zip(arrivals, lengths, strict=True)]


def poisson(rate: float, num_requests: int, seed: int) -> list[float]:
    """Arrival times in seconds: the first at 0, then exponential gaps of mean `1 / rate`."""
    random = Random(f"{seed}/arrivals")
    gaps = [0.0, *(random.expovariate(rate) for _ in range(num_requests - 1))]
    return list(accumulate(gaps))


def parse_lengths(flag: str, text: str) -> Lengths:
    """`64`, `16-128` or `uniform:16-128`. Raises ConfigError."""
    match = re.fullmatch(r"(?:uniform:)?(\d+)-(\d+)|(\d+)", text.strip(), re.ASCII)
    if match is None:
        raise ConfigError(f"{flag}: should be a number or a range such as 16-128 (given {text!r})")
    low, high = int(match[1] or match[3]), int(match[2] or match[3])
    if not 1 <= low <= high:
        raise ConfigError(f"{flag}: should be at least 1 and rise (given {text!r})")
    return Lengths(low, high)
