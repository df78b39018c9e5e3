"""What a calibration finds: the depth, controls of equal budget, diagnostics, and generated texts.

Plain results, made by `calibrate` and shown by `report`; no model, tensor or file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from boundary.intervals import Interval
from boundary.mask import Mask
from boundary.selection import Selection


@dataclass(frozen=True, slots=True)
class ControlResult:
    """Another way to spend the chosen depth's budget of layers, scored on the same samples.

    mean: mean score over all samples; over several masks, of their mean sample by sample.
    difference: mean of (chosen depth - control) on the confirming half; None where there were too
        few samples for an interval.
    masks: the layers that had LoRA; one mask, or one a draw for random layers.
    """

    mean: float
    difference: Interval | None
    masks: tuple[Mask, ...]


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """One prompt's continuations, by the depth that made them.

    by_depth: generated text by depth; 0 is the base model, `num_layers` the whole adapter.
    """

    prompt: str
    reference: str
    by_depth: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class LensMeans:
    """A `LogitLens` averaged over samples: one probability a layer."""

    base: tuple[float, ...]
    full: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What a calibration found.

    scores: float64 `[num_samples, num_layers + 1]`, higher is better.
    controls: `top_k`, the layers of the largest LoRA output norm, and `random_k`, each as many
        layers with LoRA as the proposed depth has, scored by a sweep: with `kl_to_full` where that is
        the metric, else by log-likelihood. Empty where no depth between base and full was proposed.
    lens: over the samples that have a completion; None if not measured.
    lora_norms: one a layer, the mean over samples; None if not measured.
    num_layer_evaluations: by stage (`score`, `controls`, `lens`, `norms`), in passes of one sample
        through one decoder layer; one pass a depth would have taken `num_samples * num_layers *
        (num_layers + 1)` for the scores.
    """

    selection: Selection
    scores: NDArray[np.float64]
    controls: Mapping[str, ControlResult]
    lens: LensMeans | None
    lora_norms: tuple[float, ...] | None
    num_layer_evaluations: Mapping[str, int]
