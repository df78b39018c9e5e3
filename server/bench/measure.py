"""Timings to numbers: rates, percentiles, ratios. Pure functions of what `load` noted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from server.bench.load import LoadResult

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds; None where nothing was seen."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one number a repeat."""

    median: float
    min: float
    max: float
    each: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """At least one value."""
        return cls(median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one side. Rates count the tokens of requests that ended well."""

    duration_s: float
    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    time_to_first_token_s: Percentiles
    inter_token_s: Percentiles
    latency_s: Percentiles
    num_steps: int | None = None
    num_preemptions: int | None = None
    num_recomputed_tokens: int | None = None
    layers_applied: int | None = None
    layers_skipped: int | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the baseline's output tokens a second the engine made, run by run.

    In an open loop that keeps up, both make as many as arrive: there `latency` is what tells.
    """

    baseline: str
    median: float
    min: float
    max: float
    each: tuple[float, ...]
    latency: float | None
    """How many times as long as the engine's the baseline's median request took; median of the runs."""


def measure(result: LoadResult) -> Measurement:
    """Numbers of one run."""
    good = [timing for timing in result.timings if timing.error is None]
    num_output_tokens = sum(timing.num_output_tokens for timing in good)
    counters = result.counters
    return Measurement(
        duration_s=result.duration_s,
        num_requests=len(result.timings),
        num_failed=len(result.timings) - len(good),
        num_prompt_tokens=sum(timing.num_prompt_tokens for timing in good),
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(timing.num_cached_tokens for timing in good),
        output_tokens_per_s=num_output_tokens / result.duration_s,
        requests_per_s=len(good) / result.duration_s,
        time_to_first_token_s=percentiles([t.piece_s[0] - t.start_s for t in good if t.piece_s]),
        inter_token_s=percentiles([b - a for t in good for a, b in pairwise(t.piece_s)]),
        latency_s=percentiles([timing.end_s - timing.start_s for timing in good]),
        num_steps=None if counters is None else counters.num_steps,
        num_preemptions=None if counters is None else counters.num_preemptions,
        num_recomputed_tokens=None if counters is None else counters.num_recomputed_tokens,
        layers_applied=None if counters is None else counters.layers_applied,
        layers_skipped=None if counters is None else counters.layers_skipped,
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """The three that are reported."""
    p50, p95, p99 = (percentile(values, percent) for percent in PERCENTILES)
    return Percentiles(p50, p95, p99)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the two nearest ranks, as numpy's default."""
    if not values:
        return None
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def ratio(baseline: str, engine: Sequence[Measurement], other: Sequence[Measurement]) -> Ratio:
    """The engine's runs over the baseline's, in pairs of the same repeat."""
    each = tuple(
        ours.output_tokens_per_s / theirs.output_tokens_per_s
        for ours, theirs in zip(engine, other, strict=True)
    )
    latencies = [
        theirs.latency_s.p50 / ours.latency_s.p50
        for ours, theirs in zip(engine, other, strict=True)
        if ours.latency_s.p50 and theirs.latency_s.p50
    ]
    latency = median(latencies) if latencies else None
    return Ratio(baseline, median(each), min(each), max(each), each, latency)


def typical(runs: Sequence[Measurement]) -> Measurement:
    """The run in the middle by output tokens a second: numbers that belong together, not a mixture."""
    ordered = sorted(runs, key=lambda run: run.output_tokens_per_s)
    return ordered[(len(ordered) - 1) // 2]
