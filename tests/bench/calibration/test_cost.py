"""Scores are compared before anything is timed; sides take turns; ratios are of one repeat."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from boundary.sweep import Scores
from server.bench.calibration import cost as cost_module
from server.bench.calibration.cost import TOLERANCE, measure_cost
from server.bench.calibration.sides import REFERENCE, random_samples, three_sides
from server.bench.measure import Spread
from server.bench.shape import parse_shape

SHAPE = parse_shape("3x32:vocab=50:positions=64")
SAMPLES = random_samples(2, 7, 4, 50, seed=1)


class Sides:
    """Take as long as they are told to, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(cost_module.time, "perf_counter", lambda: self.now)

    def side(self, name: str, seconds: list[float], score: float = 1.0) -> Callable[[], Scores]:
        takes = iter([0.0, *seconds])  # first comes the comparison

        def run() -> Scores:
            self.order.append(name)
            self.now += next(takes)
            return np.full((2, 4), score)

        return run


def test_ratios_are_of_one_repeat_and_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(monkeypatch)
    found = measure_cost(
        {
            REFERENCE: sides.side("r", [10, 20, 10]),
            "sweep": sides.side("s", [5, 11, 6], score=1 + TOLERANCE / 2),
        },
        SAMPLES,
        num_layers=3,
        repeat=3,
    )
    assert sides.order == ["r", "s"] * 4
    assert found.seconds[REFERENCE] == Spread(10, 10, 20, (10, 20, 10))
    assert found.ratios == {"sweep": Spread(0.55, 0.5, 0.6, (0.5, 0.55, 0.6))}
    assert found.max_differences["sweep"] == pytest.approx(TOLERANCE / 2)
    assert found.layer_evaluations == 6 / 8
    assert (found.num_samples, found.num_tokens) == (2, 11)
    assert found.step == 0
    assert found.is_equal


@pytest.mark.parametrize("score", [1 + 2 * TOLERANCE, float("nan")])
def test_unequal_scores_are_not_timed(monkeypatch: pytest.MonkeyPatch, score: float) -> None:
    sides = Sides(monkeypatch)
    found = measure_cost(
        {REFERENCE: sides.side("r", [1]), "sweep": sides.side("s", [1], score=score)},
        SAMPLES,
        num_layers=3,
        repeat=1,
    )
    assert not found.is_equal
    assert sides.order == ["r", "s"]
    assert found.seconds == found.ratios == {}


def test_the_three_sides_score_alike_and_every_depth_otherwise(tmp_path: Path) -> None:
    with three_sides(SHAPE, SAMPLES, tmp_path, rank=4, seed=0) as sides:
        scores = {name: side() for name, side in sides.items()}
    assert list(scores) == [REFERENCE, "sweep", "server"]
    for found in scores.values():
        np.testing.assert_allclose(found, scores[REFERENCE], atol=TOLERANCE)
    # Were depths alike, an adapter that is not applied at all would pass as equal.
    steps = np.abs(np.diff(scores[REFERENCE], axis=1))
    assert steps.min() > 3 * TOLERANCE


def test_samples_come_from_their_seed() -> None:
    assert random_samples(2, 7, 4, 50, seed=1) == SAMPLES
    assert random_samples(2, 7, 4, 50, seed=2) != SAMPLES
    assert {len(sample.prompt_token_ids) for sample in SAMPLES} == {7}
    assert {len(sample.completion_token_ids) for sample in SAMPLES} == {4}
