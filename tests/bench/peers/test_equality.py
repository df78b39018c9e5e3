"""The check before timing: a tie is told from a mistake, and nothing else passes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from server.bench.mix import Choice
from server.bench.workload import WorkItem
from tests.bench.peers.equality import compare, first_difference

ITEM = WorkItem((1, 2), 3, Choice("a0"))
OTHER = WorkItem((3, 4), 3, Choice())
EXPECTED = {ITEM.prompt: [5, 6, 7], OTHER.prompt: [5, 6, 7]}


class Scores:
    """At the third place token 8 is `gap` nats behind token 7."""

    name = "scores"

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def complete(self, batch: Sequence[WorkItem]) -> list[list[int]]:
        raise NotImplementedError

    def log_probabilities(self, item: WorkItem, completion: Sequence[int]) -> Tensor:
        assert list(completion) == [5, 6, 7]
        scores = torch.full((3, 10), -9.0, dtype=torch.float64)
        scores[2, 7], scores[2, 8] = -1.0, -1.0 - self.gap
        return scores


@pytest.mark.parametrize(
    ("wanted", "got", "place"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([1, 2], [1], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1], [], 0),
    ],
)
def test_the_first_difference(wanted: list[int], got: list[int], place: int | None) -> None:
    assert first_difference(wanted, got) == place


def test_equal_completions_pass() -> None:
    found = compare(Scores(1.0), [ITEM, OTHER], EXPECTED, EXPECTED)
    assert found.is_passed
    assert (found.num_equal, found.num_ties, found.num_checked) == (2, 0, 2)


@pytest.mark.parametrize(("gap", "passes"), [(0.9e-4, True), (1.1e-4, False)])
def test_only_a_tie_is_forgiven_and_it_is_counted(gap: float, passes: bool) -> None:
    completions = {ITEM.prompt: [5, 6, 8], OTHER.prompt: [5, 6, 7]}
    found = compare(Scores(gap), [ITEM, OTHER], EXPECTED, completions)
    assert found.is_passed is passes
    assert found.num_equal == 1
    assert found.num_ties == int(passes)
    assert ("a0" in str(found)) is not passes


@pytest.mark.parametrize("got", [[5, 6], [5, 6, 7, 7], [5, 6, -1], [5, 6, 99]])
def test_a_missing_or_impossible_token_is_no_tie(got: list[int]) -> None:
    found = compare(Scores(0.0), [ITEM], EXPECTED, {ITEM.prompt: got})
    assert not found.is_passed
