"""Selection on scores whose truth is known: how often it is right, and that its guards matter."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from boundary import intervals
from boundary import selection as module
from boundary.intervals import Interval, simultaneous_intervals
from boundary.selection import MIN_SAMPLES, Selection, compare_controls, proposing_half, select

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], Floats]

NUM_DRAWS = 400
NUM_RESAMPLES = 200  # the default is 2000: rates are much the same, and these tests are seconds


def gaussian(rng: np.random.Generator, num_samples: int, num_depths: int) -> Floats:
    """Hard and easy samples, and noise of their own at every depth."""
    return 3 * rng.normal(size=(num_samples, 1)) + rng.normal(size=(num_samples, num_depths))


def walk(rng: np.random.Generator, num_samples: int, num_depths: int) -> Floats:
    """Neighbouring depths alike, as in real curves."""
    return rng.normal(size=(num_samples, num_depths)).cumsum(axis=1)


def heavy_tails(rng: np.random.Generator, num_samples: int, num_depths: int) -> Floats:
    return rng.standard_t(3, size=(num_samples, num_depths))


def rare_losses(rng: np.random.Generator, num_samples: int, num_depths: int) -> Floats:
    """Differences to full that are skewed to the left, the bad side."""
    scores = 1 - rng.exponential(size=(num_samples, num_depths))
    scores[:, -1] = 0
    return scores


def exact_match(rng: np.random.Generator, num_samples: int, num_depths: int) -> Floats:
    return (rng.random((num_samples, num_depths)) < 0.3).astype(np.float64)


def mostly_ties(rng: np.random.Generator, num_samples: int, num_depths: int) -> Floats:
    """Exact match in which a depth changes few answers."""
    right = rng.random((num_samples, 1)) < 0.5
    is_drawn_anew = rng.random((num_samples, num_depths)) < 0.1
    anew = rng.random((num_samples, num_depths)) < 0.5
    return np.where(is_drawn_anew, anew, right).astype(np.float64)


NOISE = [gaussian, walk, heavy_tails, rare_losses, exact_match, mostly_ties]


def verdicts(
    draw: Draw,
    num_samples: int,
    num_depths: int,
    tolerance: float = 0.0,
    proposed_depth: int | None = None,
) -> Counter[str]:
    """How often each verdict came out of `NUM_DRAWS` data sets."""
    found: Counter[str] = Counter()
    for seed in range(NUM_DRAWS):
        scores = draw(np.random.default_rng([seed, num_samples]), num_samples, num_depths)
        selection = select(
            scores,
            seed=seed,
            tolerance=tolerance,
            proposed_depth=proposed_depth,
            num_resamples=NUM_RESAMPLES,
        )
        found[selection.verdict] += 1
    return found


def planted(
    curve: list[float], num_samples: int = 200, seed: int = 0, noise: float = 0.5
) -> Floats:
    """Samples whose mean score at each depth is `curve`'s, with paired noise."""
    rng = np.random.default_rng(seed)
    spread = noise * rng.normal(size=(num_samples, len(curve)))
    return np.array(curve) + 5 * rng.normal(size=(num_samples, 1)) + spread


# Up, down, up and down again: the best is 5, and a bisection would miss it.
BUMPY = [0.0, 1.0, 0.5, 0.2, 0.8, 2.0, 1.2, 1.6, 1.0]
PLATEAU = [0.0, 0.5, 0.9, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("draw", "num_samples", "num_depths"),
    [
        *((draw, MIN_SAMPLES, 7) for draw in NOISE),
        (gaussian, 60, 33),
        (walk, 60, 33),
        (rare_losses, 150, 13),
        (exact_match, 150, 13),
    ],
)
def test_noise_keeps_full(draw: Draw, num_samples: int, num_depths: int) -> None:
    found = verdicts(draw, num_samples, num_depths)
    assert found["keep_full"] >= 0.95 * NUM_DRAWS, found
    assert found["equal_cheaper"] == 0


@pytest.mark.parametrize("draw", NOISE)
@pytest.mark.parametrize("proposed_depth", [0, 3])
def test_noise_keeps_full_whoever_proposed_the_depth(draw: Draw, proposed_depth: int) -> None:
    found = verdicts(draw, MIN_SAMPLES, 7, proposed_depth=proposed_depth)
    assert found["keep_full"] >= 0.95 * NUM_DRAWS, found
    assert found["equal_cheaper"] == 0


@pytest.mark.parametrize("draw", [gaussian, exact_match])
def test_noise_keeps_full_with_a_tolerance_that_the_samples_cannot_resolve(draw: Draw) -> None:
    found = verdicts(draw, 40, 13, tolerance=0.01)
    assert found["keep_full"] >= 0.95 * NUM_DRAWS, found


def test_noise_does_not_keep_full_without_the_held_out_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: samples that propose and confirm at once confirm far too often."""

    def same(num_samples: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
        return np.arange(num_samples), np.arange(num_samples)

    monkeypatch.setattr(module, "_halves", same)
    assert verdicts(gaussian, 40, 33)["keep_full"] < 0.85 * NUM_DRAWS


def one_at_a_time(
    differences: Floats,
    steps: Floats,
    rng: np.random.Generator,
    confidence: float,
    num_resamples: int,
) -> list[Interval]:
    """The same intervals, each for itself."""
    found = []
    for i in range(differences.shape[1]):
        column, step = differences[:, [i]], steps[[i]]
        found += simultaneous_intervals(column, step, rng, confidence, num_resamples)
    return found


def num_curves_that_hold(num_samples: int = 40, num_depths: int = 7) -> int:
    """Curves of noise of which every interval holds the truth, 0."""
    count = 0
    for seed in range(NUM_DRAWS):
        scores = gaussian(np.random.default_rng(seed), num_samples, num_depths)
        curve = select(scores, seed=seed, num_resamples=NUM_RESAMPLES).curve
        intervals = [point.interval for point in curve if point.interval]
        assert len(intervals) == num_depths
        count += all(interval.low <= 0 <= interval.high for interval in intervals)
    return count


def test_a_curves_intervals_hold_at_once() -> None:
    assert num_curves_that_hold() >= 0.94 * NUM_DRAWS  # 0.95, less one standard error


def test_a_curves_intervals_do_not_hold_at_once_without_the_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control for max-t."""
    monkeypatch.setattr(module, "simultaneous_intervals", one_at_a_time)
    assert num_curves_that_hold() < 0.9 * NUM_DRAWS


def test_a_true_loss_of_the_tolerance_is_seldom_called_equal() -> None:
    def loses(rng: np.random.Generator, num_samples: int, num_depths: int) -> Floats:
        scores = gaussian(rng, num_samples, num_depths)
        scores[:, :-1] -= 0.5
        return scores

    found = verdicts(loses, 100, 9, tolerance=0.5)
    assert found["keep_full"] >= 0.95 * NUM_DRAWS, found


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(20))
def test_a_planted_optimum_is_found(seed: int, tolerance: float) -> None:
    selection = select(planted(BUMPY, seed=seed), seed=seed, tolerance=tolerance)
    assert (selection.verdict, selection.depth, selection.best_depth) == ("improves", 5, 5)
    assert selection.num_samples_needed is None
    assert selection.confirmed_on is not None
    assert selection.confirmed_on.to_full.low > 0
    assert selection.confirmed_on.to_full.mean == pytest.approx(1.0, abs=0.3)


def test_the_smallest_depth_of_a_plateau_is_equal_and_cheaper() -> None:
    found = Counter(
        (selection.verdict, selection.depth)
        for seed in range(50)
        for selection in [
            select(
                planted(PLATEAU, seed=seed), seed=seed, tolerance=0.3, num_resamples=NUM_RESAMPLES
            )
        ]
    )
    assert found["equal_cheaper", 4] >= 40, found
    assert all(verdict != "keep_full" and 4 <= depth < 8 for verdict, depth in found)


def test_a_plateau_without_tolerance_keeps_full() -> None:
    selections = [
        select(planted(PLATEAU, seed=seed), seed=seed, num_resamples=NUM_RESAMPLES)
        for seed in range(50)
    ]
    assert sum(selection.verdict == "keep_full" for selection in selections) >= 47
    assert {s.depth for s in selections if s.verdict == "keep_full"} == {8}


def test_an_adapter_that_does_nothing_needs_no_depth() -> None:
    found = verdicts(gaussian, 100, 5, tolerance=1.0)
    assert found["equal_cheaper"] + found["improves"] >= 0.95 * NUM_DRAWS


def test_full_is_kept_where_full_is_best() -> None:
    selection = select(planted([0.0, 1, 2, 3, 4]), seed=0, tolerance=0.1)
    assert (selection.verdict, selection.depth) == ("keep_full", 4)
    assert selection.proposed_depth == 4
    assert selection.num_samples_needed is None


def test_a_relative_tolerance_is_a_share_of_the_gain() -> None:
    scores = planted([10 * score for score in PLATEAU])
    selection = select(scores, seed=0, tolerance=0.1, relative=True)
    assert selection.tolerance == pytest.approx(2.0, abs=0.1)
    assert (selection.verdict, selection.depth) == ("equal_cheaper", 4)
    no_gain = select(-scores, seed=0, tolerance=0.1, relative=True)
    assert no_gain.tolerance == 0


def test_a_depth_proposed_from_elsewhere_is_confirmed_like_any_other() -> None:
    scores = planted(BUMPY)
    own = select(scores, seed=0)
    assert select(scores, seed=0, proposed_depth=5) == own
    for depth, verdict in ((7, "improves"), (3, "keep_full"), (8, "keep_full")):
        given = select(scores, seed=0, proposed_depth=depth)
        assert (given.proposed_depth, given.verdict) == (depth, verdict)
        assert given.depth == (8 if verdict == "keep_full" else depth)
        assert given.best_depth == own.best_depth
        assert given.curve == own.curve
    equal = select(planted(PLATEAU), seed=0, tolerance=0.3, proposed_depth=6)
    assert (equal.verdict, equal.depth) == ("equal_cheaper", 6)


def test_only_the_confirming_half_judges_a_proposed_depth() -> None:
    scores = planted(BUMPY)
    half = list(proposing_half(len(scores), seed=3))
    assert tuple(half) == select(scores, seed=3).chosen_on.sample_indices  # type: ignore[union-attr]
    scores[half, 3] += 100  # 3 is worse than full
    assert select(scores, seed=3, proposed_depth=3).verdict == "keep_full"
    scores = planted(BUMPY)
    scores[np.setdiff1d(np.arange(len(scores)), half), 3] += 100
    assert select(scores, seed=3, proposed_depth=3).verdict == "improves"


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_metric_that_sees_nothing_confirms_no_depth(tolerance: float) -> None:
    selection = select(np.zeros((100, 5)), seed=0, tolerance=tolerance, proposed_depth=2)
    assert (selection.verdict, selection.depth, selection.proposed_depth) == ("keep_full", 4, 2)
    assert selection.num_samples_needed is None


def test_depths_beyond_the_adapters_reach_are_not_proposed() -> None:
    """All depths from 5 are one model, which is full: serving it at 5 is not cheaper."""
    scores = planted([0.0, 1, 2, 3, 4, 5, 5, 5, 5], noise=0)
    selection = select(scores, seed=0, tolerance=0.1, full_depth=5)
    assert (selection.verdict, selection.proposed_depth, selection.depth) == ("keep_full", 5, 8)


def test_ties_prove_nothing_in_few_samples() -> None:
    """A depth that ties in all of 40 samples may still lose 5 of 100."""
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.random((40, 1)) < 0.5, 5, axis=1).astype(np.float64)
    scores[0, 0] = 1 - scores[0, 0]
    assert select(scores, seed=0, tolerance=0.02).verdict == "keep_full"
    assert select(scores, seed=0, tolerance=0.3).verdict == "equal_cheaper"


def test_a_depth_does_not_differ_from_itself() -> None:
    """It ties with itself in every sample, which is no lack of evidence."""
    scores = exact_match(np.random.default_rng(0), 60, 5)
    scores[:, 2] = 1
    selection = select(scores, seed=0)
    assert selection.curve[-1].interval == Interval(0, 0, 0)
    assert selection.proposed_depth == selection.best_depth == 2
    for half in (selection.chosen_on, selection.confirmed_on):
        assert half is not None
        assert half.to_best == Interval(0, 0, 0)


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_metric_that_sees_nothing_keeps_full(tolerance: float) -> None:
    selection = select(np.zeros((100, 5)), seed=0, tolerance=tolerance)
    assert (selection.verdict, selection.depth, selection.proposed_depth) == ("keep_full", 4, 4)
    assert selection.best_depth == 4


@pytest.mark.parametrize("num_samples", [1, 2, MIN_SAMPLES - 1])
def test_too_few_samples_conclude_nothing_and_say_how_many_would(num_samples: int) -> None:
    scores = planted(BUMPY, num_samples)
    selection = select(scores, seed=0)
    assert (selection.verdict, selection.depth) == ("too_few", 8)
    assert selection.num_samples_needed is not None
    assert selection.num_samples_needed >= MIN_SAMPLES
    assert selection.proposed_depth is selection.confirmed_on is selection.chosen_on is None
    assert [point.score for point in selection.curve] == pytest.approx(scores.mean(axis=0))
    assert {point.interval for point in selection.curve} == {None}
    assert select(planted(BUMPY, MIN_SAMPLES), seed=0).verdict != "too_few"


def test_the_number_needed_is_about_the_number_that_does() -> None:
    """0.1 better at a spread of 0.7 needs some 800 samples: 400 say so, 2000 conclude."""
    curve = [0.0, 0.1, 0.0]
    needed = [
        selection.num_samples_needed
        for seed in range(40)
        for selection in [select(planted(curve, 400, seed), seed=seed, num_resamples=NUM_RESAMPLES)]
        if selection.num_samples_needed and selection.proposed_depth == 1
    ]
    assert len(needed) >= 10
    assert 300 < np.median(needed) < 3000
    found = [
        select(planted(curve, 2000, seed), seed=seed, num_resamples=NUM_RESAMPLES).verdict
        for seed in range(10)
    ]
    assert found.count("improves") >= 8


def test_more_spread_needs_more_samples_and_more_tolerance_fewer() -> None:
    def needed(noise: float, tolerance: float) -> int:
        scores = np.zeros((30, 3))
        scores[:, 0] = -10
        scores[:, 1] = 0.1 + np.resize([noise, -noise], 30)
        return select(scores, seed=0, tolerance=tolerance).num_samples_needed or 0

    assert needed(4, 0.2) > needed(2, 0.2) > MIN_SAMPLES
    assert needed(4, 0.2) > needed(4, 1.0) > MIN_SAMPLES


def test_the_same_seed_gives_the_same_answer_and_another_other_halves() -> None:
    scores = planted(BUMPY, 51)
    one, same, other = (select(scores, seed=seed) for seed in (1, 1, 2))
    assert one == same
    halves = [(half.sample_indices if half else ()) for half in (one.chosen_on, one.confirmed_on)]
    assert [len(half) for half in halves] == [25, 26]
    assert sorted(halves[0] + halves[1]) == list(range(51))
    assert other.chosen_on is not None
    assert other.chosen_on.sample_indices != halves[0]


@settings(max_examples=30, deadline=None)
@given(
    shift=st.floats(-100, 100),
    scale=st.floats(0.01, 100),
    num_depths=st.integers(2, 9),
    seed=st.integers(0, 1000),
)
def test_only_paired_differences_count_and_units_do_not(
    shift: float, scale: float, num_depths: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(40, num_depths)) + 0.5 * rng.normal(size=num_depths)
    moved = scale * scores + shift + 10 * rng.normal(size=(40, 1))
    one, two = (
        select(table, seed=seed, tolerance=tolerance, num_resamples=100)
        for table, tolerance in ((scores, 0.2), (moved, 0.2 * scale))
    )
    assert (one.verdict, one.depth) == (two.verdict, two.depth)


@settings(max_examples=30, deadline=None)
@given(num_samples=st.integers(1, 60), num_depths=st.integers(2, 9), seed=st.integers(0, 1000))
def test_every_verdict_is_what_its_definition_says(
    num_samples: int, num_depths: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(num_samples, num_depths)) + rng.normal(size=num_depths)
    s = select(scores, seed=seed, tolerance=0.3, num_resamples=100)
    assert len(s.curve) == num_depths
    assert (s.verdict == "too_few") == (num_samples < MIN_SAMPLES)
    if s.confirmed_on is None:
        return
    low = s.confirmed_on.to_full.low
    is_cheaper = s.proposed_depth != num_depths - 1
    assert (s.verdict == "improves") == (is_cheaper and low > 0)
    assert (s.verdict == "equal_cheaper") == (is_cheaper and -0.3 < low <= 0)
    assert s.depth == (num_depths - 1 if s.verdict == "keep_full" else s.proposed_depth)


def test_resampling_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = planted(BUMPY, 40)
    whole = select(scores, seed=0)
    monkeypatch.setattr(intervals, "MAX_BLOCK_ELEMENTS", 40 * 300)
    assert select(scores, seed=0) == whole


def test_resampled_means_and_errors_are_those_of_a_plain_bootstrap() -> None:
    """The matrix products against one resample at a time."""
    rng = np.random.default_rng(0)
    differences = rng.exponential(size=(30, 3))
    drawn = np.random.default_rng(5).integers(30, size=(200, 30))
    furthest: list[list[float]] = [[], []]
    for rows in drawn:
        resample = differences[rows]
        t = resample.mean(axis=0) - differences.mean(axis=0)
        t /= resample.std(axis=0, ddof=1) / np.sqrt(30)
        furthest[0].append(t.max())
        furthest[1].append((-t).max())
    q = np.quantile(furthest, 0.975, axis=1, method="higher").max()
    errors = differences.std(axis=0, ddof=1) / np.sqrt(30)
    found = simultaneous_intervals(differences, np.zeros(3), np.random.default_rng(5), 0.95, 200)
    for interval, mean, error in zip(found, differences.mean(axis=0), errors, strict=True):
        assert interval.mean == pytest.approx(mean)
        assert interval.low == pytest.approx(mean - q * error)
        assert interval.high == pytest.approx(mean + q * error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_sample_and_depth(value: float) -> None:
    scores = np.zeros((40, 5))
    scores[17, 3] = value
    with pytest.raises(ValueError, match=f"sample 17 at depth 3 is {value}"):
        select(scores, seed=0)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((0, 5), {}, "shape"),
        ((5,), {}, "shape"),
        ((40, 1), {}, "shape"),
        ((40, 5), {"tolerance": -1}, "tolerance"),
        ((40, 5), {"tolerance": np.nan}, "tolerance"),
        ((40, 5), {"confidence": 1.0}, "confidence"),
        ((40, 5), {"full_depth": 5}, "full_depth must be between 0 and 4, got 5"),
        ((40, 5), {"proposed_depth": 5}, "proposed_depth must be between 0 and 4, got 5"),
        ((40, 5), {"proposed_depth": 3, "full_depth": 2}, "between 0 and 2, got 3"),
        ((40, 5), {"num_resamples": 10}, "num_resamples"),
        ((40, 5), {"seed": -1}, "non-negative"),
    ],
)
def test_arguments_out_of_range_are_refused(
    shape: tuple[int, ...], arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select(np.zeros(shape), **({"seed": 0} | arguments))


def selected() -> tuple[Selection, Floats]:
    scores = planted(BUMPY)
    return select(scores, seed=0), scores


def test_controls_are_compared_on_the_confirming_half() -> None:
    selection, scores = selected()
    chosen = scores[:, selection.depth]
    noise = np.random.default_rng(9).normal(size=(2, len(chosen)))
    worse, equal = chosen - 1 + noise[0], chosen + noise[1]
    assert selection.confirmed_on is not None
    assert selection.chosen_on is not None
    worse[list(selection.chosen_on.sample_indices)] += 100  # rows that are not looked at
    found = compare_controls(selection, chosen, {"top_k": worse, "random_k": equal})
    assert found["top_k"].low > 0
    assert found["random_k"].low < 0 < found["random_k"].high
    rows = list(selection.confirmed_on.sample_indices)
    assert found["top_k"].mean == pytest.approx((chosen - worse)[rows].mean())
    assert compare_controls(selection, chosen, {}) == {}


def test_controls_are_judged_at_once() -> None:
    """Each added control widens the intervals of the others."""
    selection, scores = selected()
    chosen = scores[:, selection.depth]
    noise = np.random.default_rng(9).normal(size=(12, len(chosen)))
    controls = {str(i): chosen + row for i, row in enumerate(noise)}
    alone = compare_controls(selection, chosen, {"0": controls["0"]})["0"]
    among = compare_controls(selection, chosen, controls)["0"]
    assert among.mean == pytest.approx(alone.mean)
    assert among.high - among.low > 1.1 * (alone.high - alone.low)


def test_controls_that_do_not_fit_are_refused_by_name() -> None:
    selection, scores = selected()
    chosen = scores[:, 0]
    with pytest.raises(ValueError, match=r"control 'x' must have 200 scores, got shape \(3,\)"):
        compare_controls(selection, chosen, {"x": np.zeros(3)})
    bad = chosen.copy()
    bad[7] = np.nan
    with pytest.raises(ValueError, match="control 'x': score of sample 7 is nan"):
        compare_controls(selection, chosen, {"x": bad})
    with pytest.raises(ValueError, match="too few"):
        compare_controls(select(np.zeros((5, 3)), seed=0), np.zeros(5), {"x": np.zeros(5)})
