"""What a sweep costs beside the plain reference: the same scores first, then the same work in turn.

All sides run in this thread, one after the other in every repeat, so that a noisy minute hits all.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from boundary.dataset import Sample
from boundary.sample import token_ids
from server.bench.calibration.sides import REFERENCE, Side
from server.bench.measure import Spread

TOLERANCE = 1e-4
"""Of a score, in float32: what `sweep` promises."""


@dataclass(frozen=True, slots=True)
class SweepCost:
    """One model.

    layer_evaluations: of a sweep over those of the reference, `(L + 3) / (2 L + 2)`.
    step: between the scores of neighbouring depths, the mean distance: what a difference is small
        beside.
    max_differences: by side, the largest between its scores and the reference's.
    seconds, ratios: by side; a ratio is the side's time over the reference's of the same repeat.
        Empty where a difference is over the tolerance.
    """

    num_layers: int
    num_samples: int
    num_tokens: int
    layer_evaluations: float
    step: float
    max_differences: Mapping[str, float]
    seconds: Mapping[str, Spread]
    ratios: Mapping[str, Spread]

    @property
    def is_equal(self) -> bool:
        """Whether every side scored as the reference did."""
        return max(self.max_differences.values()) <= TOLERANCE


def measure_cost(
    sides: Mapping[str, Side], samples: Sequence[Sample], num_layers: int, repeat: int
) -> SweepCost:
    """Compare, which warms up as well, then time. `sides` hold the reference."""
    expected = sides[REFERENCE]()
    differences = {
        name: float(np.abs(side() - expected).max())
        for name, side in sides.items()
        if name != REFERENCE
    }
    rounds = range(repeat if max(differences.values()) <= TOLERANCE else 0)
    seconds = [{name: _timed(side) for name, side in sides.items()} for _ in rounds]
    return SweepCost(
        num_layers=num_layers,
        num_samples=len(samples),
        num_tokens=max(len(token_ids(sample)) for sample in samples),
        layer_evaluations=(num_layers + 3) / (2 * num_layers + 2),
        step=float(np.abs(np.diff(expected, axis=1)).mean()),
        max_differences=differences,
        seconds={name: Spread.of([one[name] for one in seconds]) for name in sides if seconds},
        ratios={
            name: Spread.of([one[name] / one[REFERENCE] for one in seconds])
            for name in differences
            if seconds
        },
    )


def _timed(side: Side) -> float:
    began = time.perf_counter()
    side()
    return time.perf_counter() - began
