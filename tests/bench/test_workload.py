"""The same seed makes the same work; every run has prompts of its own."""

from itertools import pairwise
from statistics import mean

import pytest

from server.bench.mix import mix_of
from server.bench.workload import Lengths, draw_rows, make_workload, parse_lengths, poisson
from server.config import ConfigError


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("64", Lengths(64, 64)), ("16-128", Lengths(16, 128)), ("uniform:1-2", Lengths(1, 2))],
)
def test_lengths(text: str, lengths: Lengths) -> None:
    assert parse_lengths("--prompt-len", text) == lengths


@pytest.mark.parametrize("text", ["", "0", "8-4", "0-4", "-3", "4-", "normal:1-2", "1.5", "²"])
def test_what_is_no_length_is_refused_by_its_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-len"):
        parse_lengths("--output-len", text)


def test_arrivals_are_poisson_and_seeded() -> None:
    arrivals = poisson(10.0, 4001, seed=3)
    gaps = [b - a for a, b in pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert min(gaps) > 0
    assert mean(gaps) == pytest.approx(0.1, rel=0.05)
    # The mean gap of an exponential is its standard deviation too.
    assert mean((gap - 0.1) ** 2 for gap in gaps) ** 0.5 == pytest.approx(0.1, rel=0.1)
    assert poisson(10.0, 4001, seed=3) == arrivals
    assert poisson(10.0, 5, seed=4) != arrivals[:5]


def test_runs_differ_in_prompts_alone() -> None:
    rows = draw_rows(Lengths(4, 9), Lengths(2, 5), 6, rate=3.0, seed=7)
    workload = make_workload(rows, mix_of(["a0", "a1"], "full,1"), vocab_size=50, seed=7)
    first, second = workload.run(0), workload.run(1)
    assert workload.run(0) == first
    assert all(one.prompt != other.prompt for one, other in zip(first, second, strict=True))
    for one, other in zip(first, second, strict=True):
        assert len(one.prompt) == len(other.prompt)
        assert (one.output_len, one.choice, one.arrival_s) == (
            other.output_len,
            other.choice,
            other.arrival_s,
        )
        assert set(one.prompt) <= set(range(50))
        assert len(one.prompt) + one.output_len <= workload.max_len


def test_a_closed_loop_has_no_arrivals() -> None:
    rows = draw_rows(Lengths(4, 4), Lengths(2, 2), 3, rate=None, seed=0)
    assert [row.arrival_s for row in rows] == [0.0, 0.0, 0.0]
