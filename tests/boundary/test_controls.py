"""Controls of equal budget: which layers, and how they are compared."""

import numpy as np
import pytest

from boundary.controls import budget_of, control_masks, control_results
from boundary.intervals import Interval
from boundary.mask import Mask
from boundary.selection import select

NORMS = np.array([0.1, 3.0, 0.0, 3.0, 2.0, 9.0])
LORA_LAYERS = [0, 1, 3, 4]


def layers(mask: Mask) -> list[int]:
    return [layer_idx for layer_idx, on in enumerate(mask) if on]


@pytest.mark.parametrize(
    ("depth", "budget"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (5, 0), (6, 0)]
)
def test_the_budget_counts_layers_with_lora(depth: int, budget: int) -> None:
    assert budget_of(depth, LORA_LAYERS) == budget


@pytest.mark.parametrize(("budget", "top"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4])])
def test_top_k_are_the_layers_with_lora_that_put_out_most(budget: int, top: list[int]) -> None:
    (mask,) = control_masks(budget, LORA_LAYERS, NORMS, seed=0, num_random_masks=0)["top_k"]
    assert layers(mask) == top


def test_random_layers_are_drawn_by_the_seed_among_those_with_lora() -> None:
    draws = [control_masks(2, LORA_LAYERS, NORMS, seed, 50)["random_k"] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    drawn = [tuple(layers(mask)) for mask in draws[0]]
    assert len(drawn) == 50
    assert {len(pair) for pair in drawn} == {2}
    assert {layer_idx for pair in drawn for layer_idx in pair} == set(LORA_LAYERS)
    assert len(set(drawn)) == 6  # all there are


def test_without_draws_there_is_no_random_control() -> None:
    assert set(control_masks(1, LORA_LAYERS, NORMS, 0, 0)) == {"top_k"}


def test_results_are_means_over_draws_and_differences_on_the_confirming_half() -> None:
    rng = np.random.default_rng(0)
    selection = select(rng.normal(loc=(0, 5, 0), size=(60, 3)), seed=0)
    assert selection.proposed_depth == 1
    assert selection.confirmed_on is not None
    chosen, one, two = (True, False), (False, True), (True, True)
    scores = {chosen: rng.normal(size=60), one: rng.normal(size=60), two: rng.normal(size=60)}
    found = control_results(
        selection, chosen, {"top_k": (one,), "random_k": (one, two, one)}, scores
    )
    random = (2 * scores[one] + scores[two]) / 3
    assert found["top_k"].mean == pytest.approx(scores[one].mean())
    assert found["random_k"].mean == pytest.approx(random.mean())
    assert found["random_k"].masks == (one, two, one)
    held_out = list(selection.confirmed_on.sample_indices)
    for name, control in (("top_k", scores[one]), ("random_k", random)):
        difference = found[name].difference
        assert difference is not None
        assert difference.mean == pytest.approx((scores[chosen] - control)[held_out].mean())
        assert difference.low < difference.mean < difference.high


def test_the_same_layers_do_not_differ() -> None:
    selection = select(np.random.default_rng(0).normal(loc=(0, 5, 0), size=(60, 3)), seed=0)
    chosen, other = (True, False), (False, True)
    scores = {chosen: np.arange(60.0), other: np.zeros(60)}
    found = control_results(
        selection, chosen, {"top_k": (chosen,), "random_k": (other, chosen)}, scores
    )
    assert found["top_k"].difference == Interval(0.0, 0.0, 0.0)
    assert found["random_k"].difference is not None
    assert found["random_k"].difference.low > 0
