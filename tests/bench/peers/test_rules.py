"""The discard rule, the order of samples and the ratios: what decides which numbers are published."""

from collections import Counter

import pytest

from tests.bench.peers.cases import BY_KEY, CASES, TARGETS, run_number
from tests.bench.peers.ratios import Sample, result, spread
from tests.bench.peers.reference import is_disturbed
from tests.bench.peers.rounds import order


def sample(
    peer: str, round_number: int, rate: float, *, discarded: bool = False, error: str | None = None
) -> Sample:
    return Sample(
        "16-four", peer, round_number, 0, 2.0, int(2 * rate), (1.0, 1.0), discarded, error
    )


@pytest.mark.parametrize(
    ("before_s", "after_s", "disturbed"),
    [
        (1.0, 1.0, False),
        (1.0, 1.149, False),
        (1.0, 1.151, True),
        (1.151, 1.0, True),
        (1.24, 1.24, False),
        (1.26, 1.26, True),
        (0.74, 0.74, True),
        (1.12, 1.26, True),
    ],
)
def test_a_sample_is_discarded_by_either_half_of_the_rule(
    before_s: float, after_s: float, disturbed: bool
) -> None:
    history = [0.98, 1.0, 1.02]
    assert is_disturbed(before_s, after_s, history) is disturbed


def test_every_round_has_every_peer_once_and_begins_with_another() -> None:
    cases = CASES[:2]
    peers = {"1-base": ["a", "b", "c"], "1-adapter": ["a", "b"]}
    found = [[*order(cases, peers, number)] for number in range(3)]
    once = {(key, peer): 1 for key, names in peers.items() for peer in names}
    assert [Counter((case.key, peer) for case, peer in taken) for taken in found] == [once] * 3
    assert [taken[0][1] for taken in found] == ["a", "b", "c"]


def test_a_case_that_nobody_can_do_has_no_samples() -> None:
    assert list(order(CASES[:1], {"1-base": []}, 1)) == []


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was half as fast in the second round: medians over all rounds would say 2.67.
    samples = [
        sample("fathom", 0, 400.0),
        sample("vllm", 0, 100.0),
        sample("fathom", 1, 200.0),
        sample("vllm", 1, 50.0),
    ]
    found = result(samples, "16-four", "vllm")
    assert found.ratio is not None
    assert (found.ratio.median, found.ratio.min, found.ratio.max) == (4.0, 4.0, 4.0)
    assert found.tokens_per_s is not None
    assert found.tokens_per_s.median == 75.0


def test_what_was_discarded_or_failed_counts_nowhere() -> None:
    samples = [
        sample("fathom", 0, 400.0),
        sample("vllm", 0, 10.0, discarded=True),
        sample("vllm", 0, 200.0),
        sample("fathom", 1, 400.0),
        sample("vllm", 1, 10.0, error="500"),
        sample("fathom", 2, 999.0, discarded=True),
        sample("vllm", 2, 200.0),
    ]
    found = result(samples, "16-four", "vllm")
    assert found.ratio is not None
    assert (found.ratio.num, found.ratio.median) == (1, 2.0)
    assert found.tokens_per_s is not None
    assert (found.tokens_per_s.num, found.tokens_per_s.min) == (2, 200.0)


@pytest.mark.parametrize(("rate", "met"), [(179.0, False), (180.0, True)])
def test_a_target_is_met_by_the_median(rate: float, met: bool) -> None:
    samples = [sample("fathom", 0, rate), sample("vllm", 0, 100.0)]
    found = result(samples, "16-four", "vllm")
    assert found.target == TARGETS["16-four", "vllm"] == 1.8
    assert found.is_met is met


def test_without_a_pair_there_is_neither_ratio_nor_verdict() -> None:
    found = result([sample("fathom", 0, 100.0), sample("vllm", 1, 100.0)], "16-four", "vllm")
    assert found.ratio is None
    assert found.is_met is None
    assert spread([]) is None


def test_no_two_runs_share_prompts() -> None:
    numbers = [
        run_number(case, round_number, attempt)
        for case in CASES
        for round_number in range(20)
        for attempt in range(100)
    ]
    assert len(set(numbers)) == len(numbers)
    workload = BY_KEY["16-four"].workload(32, 8000, 0)
    assert workload.run(numbers[0]) != workload.run(numbers[1])


def test_four_adapters_get_equal_shares_and_all_lengths_are_the_same() -> None:
    items = BY_KEY["16-four"].workload(32, 8000, 0).run(1)
    assert set(Counter(item.choice.adapter for item in items).values()) == {8}
    assert {(len(item.prompt), item.output_len) for item in items} == {(64, 64)}
