"""The tables: nobody is left out silently, and a missed target is seen."""

import pytest

from tests.bench.peers import table
from tests.bench.peers.cases import BY_KEY
from tests.bench.peers.ratios import Result, Spread

CASES = [BY_KEY["1-base"], BY_KEY["16-four"]]
TITLES = {"fathom": "Fathom", "vllm": "vLLM"}


def results(ratio: float) -> list[Result]:
    spread = Spread(100.0, 90.0, 110.0, 5)
    return [
        Result("16-four", "fathom", spread, None, None),
        Result("16-four", "vllm", spread, Spread(ratio, 1.5, 2.5, 5), 1.8),
    ]


def test_where_there_is_no_number_its_reason_stands() -> None:
    excluded = {("1-base", "vllm"): "excluded: 3 of 20 | equal\nto PEFT's"}
    text = table.rates(CASES, TITLES, results(2.0), excluded, {("16-four", "vllm"): "a note"})
    header, rule, ours, theirs = text.splitlines()
    assert header.count("|") == rule.count("|") == ours.count("|") == 4
    assert "100.0 (90.0 to 110.0)" in ours
    assert "no sample was kept" in ours
    assert theirs.endswith("| 100.0 (90.0 to 110.0) a note |")
    assert "excluded: 3 of 20 \\| equal to PEFT's" in theirs


@pytest.mark.parametrize(("ratio", "word"), [(2.0, "yes"), (1.7, "**no**")])
def test_a_ratio_stands_beside_its_target(ratio: float, word: str) -> None:
    lines = table.ratios(CASES, TITLES, results(ratio)).splitlines()
    assert len(lines) == 3
    assert lines[2].endswith(f"| {ratio:.2f} (1.50 to 2.50) | 5 | >= 1.8 | {word} |")


def test_a_ratio_without_a_target_or_without_rounds_has_no_verdict() -> None:
    found = [Result("16-four", "vllm", None, None, 1.8)]
    assert table.ratios(CASES, TITLES, found).splitlines()[2].endswith("| - | 0 | >= 1.8 | - |")
