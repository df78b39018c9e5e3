"""Percentiles, rates and ratios, beside numpy and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.load import Counters, LoadResult, Timing
from server.bench.measure import (
    Measurement,
    Percentiles,
    measure,
    percentile,
    percentiles,
    ratio,
    typical,
)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.sampled_from([0, 1, 50, 90, 95, 99, 100]),
)
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    expected = float(np.percentile(values, percent))
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_nothing_seen_has_no_percentile() -> None:
    assert percentiles([]) == Percentiles(None, None, None)


def run(tokens_per_s: float) -> Measurement:
    return measure(LoadResult(1.0, (Timing(0.0, [0.5], 1.0, 1, int(tokens_per_s)),)))


def test_a_failed_request_counts_as_failed_and_gives_no_tokens() -> None:
    good = Timing(0.5, [1.0, 1.25, 2.0], 2.5, 10, 3, 4)
    bad = Timing(0.0, [9.0], 10.0, 10, 7, error="it broke")
    found = measure(LoadResult(2.0, (good, bad), Counters(5, 1, 9, 4, 30, 6)))
    assert (found.num_requests, found.num_failed) == (2, 1)
    assert (found.num_prompt_tokens, found.num_output_tokens, found.num_cached_tokens) == (10, 3, 4)
    assert found.output_tokens_per_s == 1.5
    assert found.requests_per_s == 0.5
    assert found.time_to_first_token_s.p50 == 0.5
    assert found.inter_token_s.p50 == 0.5
    assert found.latency_s.p99 == 2.0
    assert (found.num_steps, found.num_preemptions, found.num_recomputed_tokens) == (5, 1, 9)


def test_ratios_are_of_the_same_repeat() -> None:
    found = ratio("peft", [run(20), run(60), run(40)], [run(10), run(20), run(40)])
    assert found.each == (2.0, 3.0, 1.0)
    assert (found.median, found.min, found.max) == (2.0, 1.0, 3.0)
    assert found.latency == 1.0


def test_the_typical_run_is_one_of_the_runs() -> None:
    runs = [run(30), run(10), run(20)]
    assert typical(runs) is runs[2]
    assert typical(runs[:2]) is runs[1]
