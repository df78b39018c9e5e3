"""Mean scores on samples that took no part in a calibration: what its depth is worth on new data.

Base, chosen and full by the calibration's own metric. Where that is computed by a sweep, also the
lowest k layers beside two other choices of as many, `top_k` and `random_k`: k is that of the proposed
depth or, where base or full was proposed, half of the layers that have LoRA.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from boundary.controls import budget_of, control_masks
from boundary.dataset import Dataset
from boundary.mask import Mask
from boundary.options import KL_METRIC, SWEEP_METRICS, CalibrationOptions
from boundary.progress import Progress
from boundary.score import LOG_LIKELIHOOD, KLToFull, Score
from boundary.sweep import sweep_slices
from boundary.text_score import text_score
from server.calibration.generation import GenerationOptions, generate_texts, texts_max_tokens
from server.calibration.outcome import Outcome
from server.calibration.pipeline import OnProgress
from server.engine.protocol import Engine, SliceHost, Slices
from server.engine.request import AdapterRef


@dataclass(frozen=True, slots=True)
class HeldOut:
    """scores: by `base`, `chosen`, `full`, and where k is known `lowest_k`, `top_k`, `random_k`."""

    scores: dict[str, float]
    num_samples: int
    k: int | None


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the result: the mean over these masks."""

    name: str
    masks: tuple[Mask, ...]


async def held_out_scores(
    engine: Engine,
    adapter: AdapterRef,
    dataset: Dataset,
    outcome: Outcome,
    options: CalibrationOptions,
    generation: GenerationOptions,
    on_progress: OnProgress,
) -> HeldOut:
    """dataset: no sample of which was calibrated with; that is for the caller to see to."""
    depths = {
        "base": 0,
        "chosen": outcome.calibration.selection.depth,
        "full": engine.info.num_layers,
    }
    if options.metric not in SWEEP_METRICS:
        texts = await _of_texts(engine, adapter, dataset, depths, options, generation, on_progress)
        return HeldOut(texts, len(dataset.samples), None)
    rows, k = _rows(depths, outcome, options, engine.info.num_layers)

    def make(host: SliceHost) -> Slices:
        return _sweep(host, adapter, dataset, rows, options)

    found: dict[str, float] = await engine.run_slices(make, on_progress)
    return HeldOut(found, len(dataset.samples), k)


def _rows(
    depths: dict[str, int], outcome: Outcome, options: CalibrationOptions, num_layers: int
) -> tuple[list[_Row], int | None]:
    def lowest(depth: int) -> Mask:
        return tuple(layer_idx < depth for layer_idx in range(num_layers))

    rows = [_Row(name, (lowest(depth),)) for name, depth in depths.items()]
    layers = list(outcome.report.lora_layers or range(num_layers))
    norms = outcome.calibration.lora_norms
    proposed = outcome.calibration.selection.proposed_depth
    k = budget_of(proposed or 0, layers) or len(layers) // 2
    if norms is None or k == 0:
        return rows, None
    masks = control_masks(k, layers, np.array(norms), options.seed, options.num_random_masks)
    rows.append(_Row("lowest_k", (lowest(layers[k - 1] + 1),)))
    rows += [_Row(name, drawn) for name, drawn in masks.items()]
    return rows, k


def _sweep(
    host: SliceHost,
    adapter: AdapterRef,
    dataset: Dataset,
    rows: Sequence[_Row],
    options: CalibrationOptions,
) -> Generator[Progress, None, dict[str, float]]:
    is_distance = options.metric == KL_METRIC
    score: Score = KLToFull() if is_distance else LOG_LIKELIHOOD
    masks = list(dict.fromkeys(mask for row in rows for mask in row.masks))
    with host.rows(adapter) as lora:
        scores = yield from sweep_slices(
            host.model,
            dataset.samples,
            score=score,
            masks=masks,
            rows=lora,
            max_tokens=host.max_tokens,
            stage="held out",
        )
    means = dict(zip(masks, (0.0 - scores if is_distance else scores).mean(axis=0), strict=True))
    return {row.name: float(np.mean([means[mask] for mask in row.masks])) for row in rows}


async def _of_texts(
    engine: Engine,
    adapter: AdapterRef,
    dataset: Dataset,
    depths: dict[str, int],
    options: CalibrationOptions,
    generation: GenerationOptions,
    on_progress: OnProgress,
) -> dict[str, float]:
    samples = dataset.samples
    places = [
        (index, depth) for depth in sorted(set(depths.values())) for index in range(len(samples))
    ]
    texts = await generate_texts(
        engine,
        adapter,
        samples,
        places,
        texts_max_tokens(samples, generation, engine.info.max_model_len),
        generation,
        lambda done: on_progress(Progress("held out", done, len(places))),
    )
    score = text_score(options.metric, pattern=generation.pattern)
    return {
        name: float(
            np.mean(
                [score(texts[index, depth].text, s.completion) for index, s in enumerate(samples)]
            )
        )
        for name, depth in depths.items()
    }
