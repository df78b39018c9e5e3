"""One adapter's calibration in numbered steps: scores, choice, controls, diagnostics.

In slices, so that a server can go on serving in between, or at one go. Knows no file, no store and
no text: scores of generated text are given to it by whoever generates. The idea is that of "Not All
LoRA Parameters Are Essential" (arXiv 2503.23360), of which only the abstract is public to us: a few
samples find the layer beyond which LoRA is dropped, by reading a probability curve or by a search.
How either is done here is our own.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial

from torch import nn

from boundary.controls import budget_of, control_masks, control_results
from boundary.depth import num_decoder_layers
from boundary.diagnostics import depth_of_sharpest_rise
from boundary.options import KL_METRIC, SWEEP_METRICS, CalibrationOptions, check_samples
from boundary.outcome import Calibration, ControlResult, LensMeans
from boundary.passes import Passes
from boundary.progress import Progress, aside, drain
from boundary.rows import LoraRows, rows_of
from boundary.sample import Sample, completion_positions, every_position
from boundary.score import LOG_LIKELIHOOD, KLToFull, Score
from boundary.selection import MIN_SAMPLES, Selection, proposing_half, select
from boundary.sweep import MAX_LOGITS, MAX_TOKENS, Scores


def calibrate(
    model: nn.Module,
    samples: Sequence[Sample],
    options: CalibrationOptions,
    *,
    rows: LoraRows | None = None,
    full_depth: int | None = None,
    scores: Scores | None = None,
    max_tokens: int | Callable[[], int] = MAX_TOKENS,
    max_logits: int = MAX_LOGITS,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Calibration:
    """All slices of `calibrate_slices` at one go. Raises Stopped if told to stop."""
    slices = calibrate_slices(
        model, samples, options, rows=rows, full_depth=full_depth, scores=scores,
        max_tokens=max_tokens, max_logits=max_logits,
    )  # fmt: skip
    return drain(slices, on_progress=on_progress, should_stop=should_stop)


def calibrate_slices(
    model: nn.Module,
    samples: Sequence[Sample],
    options: CalibrationOptions,
    *,
    rows: LoraRows | None = None,
    full_depth: int | None = None,
    scores: Scores | None = None,
    max_tokens: int | Callable[[], int] = MAX_TOKENS,
    max_logits: int = MAX_LOGITS,
) -> Generator[Progress, None, Calibration]:
    """Find and prove an adapter's depth, in slices between which the model is free.

    Stages follow one another, each yielding before its first slice and after every one.

    model, rows, max_tokens, max_logits: see `sweep_slices`.
    full_depth: effective depth of the whole adapter; by default 1 + the highest of `rows.layers`.
    scores: float64 `[num_samples, num_layers + 1]`, higher is better, if they were made elsewhere,
        as those of generated text are.

    Raises, when it is advanced, ValueError for samples that cannot be scored so, for scores that
    are missing or do not fit, and for models that cannot be swept.
    """
    check_samples(samples, options)
    rows = rows_of(model, rows)
    passes = Passes(model, samples, rows, max_tokens, max_logits)
    num_layers, num_samples = num_decoder_layers(model), len(samples)
    if not rows.layers:
        raise ValueError("the adapter has no LoRA in any layer: there is no depth to find")
    full_depth = 1 + max(rows.layers) if full_depth is None else full_depth
    if not 1 <= full_depth <= num_layers:
        raise ValueError(f"full_depth must be between 1 and {num_layers}, got {full_depth}")
    if scores is None and options.metric not in SWEEP_METRICS:
        raise ValueError(
            f"metric {options.metric!r} is of generated text: its scores must be given"
        )
    if scores is not None and scores.shape != (num_samples, num_layers + 1):
        raise ValueError(
            f"scores must be {num_samples} samples by {num_layers + 1} depths, got {scores.shape}"
        )

    # 1. Where the depth is read off the lens: read it, of the samples that do not confirm it.
    proposed_depth = None
    if options.method == "lens" and num_samples >= MIN_SAMPLES:
        lens = yield from passes.lens(proposing_half(num_samples, options.seed))
        proposed_depth = depth_of_sharpest_rise(lens[:, 1].mean(axis=0), full_depth)

    # 2. Score every depth.
    score: Score = (
        KLToFull(_reply_or_every_position) if options.metric == KL_METRIC else LOG_LIKELIHOOD
    )
    if scores is None:
        scores = yield from passes.scores(score, None, "score")

    # 3. Choose on one half, confirm on the other.
    choose = partial(
        select, scores, seed=options.seed, tolerance=options.tolerance, relative=options.relative,
        confidence=options.confidence, full_depth=full_depth, proposed_depth=proposed_depth,
    )  # fmt: skip
    # Aside, because thousands of samples take it a second.
    selection = yield from aside("choose", choose)

    # 4. Spend the same number of layers in other ways.
    controls = yield from _controls(passes, sorted(rows.layers), selection, score, options)

    # 5. Look at all samples layer by layer.
    lens_means, lora_norms = None, None
    if options.diagnostics:
        everyone = tuple(range(num_samples))
        replied = tuple(i for i in everyone if samples[i].completion_token_ids)
        if replied:
            base, full = (yield from passes.lens(replied)).mean(axis=0).tolist()
            lens_means = LensMeans(tuple(base), tuple(full))
        lora_norms = tuple((yield from passes.norms(everyone)).mean(axis=0).tolist())

    return Calibration(
        selection, scores, controls, lens_means, lora_norms, dict(passes.num_layer_evaluations)
    )


def _controls(
    passes: Passes,
    lora_layers: list[int],
    selection: Selection,
    score: Score,
    options: CalibrationOptions,
) -> Generator[Progress, None, dict[str, ControlResult]]:
    """Other choices of as many layers as the proposed depth has with LoRA."""
    depth, chosen_on = selection.proposed_depth, selection.chosen_on
    if depth is None or chosen_on is None:
        return {}
    budget = budget_of(depth, lora_layers)
    if budget == 0:
        return {}
    # The half that confirms is not looked at to choose layers, as it was not to propose a depth.
    norms = (yield from passes.norms(chosen_on.sample_indices)).mean(axis=0)
    masks = control_masks(budget, lora_layers, norms, options.seed, options.num_random_masks)
    chosen = tuple(i in lora_layers[:budget] for i in range(len(norms)))
    distinct = list(dict.fromkeys([chosen, *(m for drawn in masks.values() for m in drawn)]))
    found = yield from passes.scores(score, distinct, "controls")
    return control_results(selection, chosen, masks, dict(zip(distinct, found.T, strict=True)))


def _reply_or_every_position(sample: Sample) -> range:
    """Where a reply is predicted, which is where generation looks; of prompts alone everywhere."""
    return completion_positions(sample) if sample.completion_token_ids else every_position(sample)
