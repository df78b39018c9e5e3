"""What a calibration can be asked, and which samples it can be asked of. Knows no model, no tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from boundary.sample import Sample

LOG_LIKELIHOOD_METRIC = "log_likelihood"
KL_METRIC = "kl_to_full"
SWEEP_METRICS = (LOG_LIKELIHOOD_METRIC, KL_METRIC)
"""Metrics that a sweep computes. Scores of any other are given."""

MAX_RANDOM_MASKS = 64

Method = Literal["sweep", "lens"]


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What a calibration can be asked.

    metric: `log_likelihood` of the completions; `kl_to_full`, which needs no completions; or the
        name of a metric of generated text, whose scores are given. With `kl_to_full` a score is
        minus the divergence, so full has the highest there is, 0, and the one verdict that can
        change the depth is `equal_cheaper`: it needs a tolerance.
    method: `sweep` proposes the depth from the scores of every depth; `lens` from the logit-lens
        curve of the full adapter (`depth_of_sharpest_rise`), which the scores must confirm just so.
    tolerance, relative, confidence: see `select`.
    seed: of the halves, the intervals and the random masks.
    num_random_masks: draws of random layers that are averaged as one control; 0 for none.
    diagnostics: whether logit lens and LoRA output norms are measured on all samples.

    Raises ValueError for values out of range.
    """

    metric: str = LOG_LIKELIHOOD_METRIC
    method: Method = "sweep"
    tolerance: float = 0.0
    relative: bool = False
    confidence: float = 0.95
    seed: int = 0
    num_random_masks: int = 5
    diagnostics: bool = True

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError("metric must not be empty")
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {self.method!r}")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance must be finite and not negative, got {self.tolerance}")
        if self.relative and self.tolerance > 1:
            raise ValueError(f"a share of the gain must be at most 1, got {self.tolerance}")
        if self.metric == KL_METRIC and self.tolerance == 0:
            raise ValueError(
                "kl_to_full needs a tolerance: nothing is closer to the full adapter than itself, so "
                "that with 0 no other depth could ever be chosen"
            )
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, got {self.confidence}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 0 <= self.num_random_masks <= MAX_RANDOM_MASKS:
            raise ValueError(
                f"num_random_masks must be between 0 and {MAX_RANDOM_MASKS}, "
                f"got {self.num_random_masks}"
            )

    @property
    def method_word(self) -> str:
        """How a record calls the way its scores were made."""
        if self.method == "lens":
            return "logit_lens"
        return "forking_sweep" if self.metric in SWEEP_METRICS else "generation"


def check_samples(samples: Sequence[Sample], options: CalibrationOptions) -> None:
    """Raise ValueError unless these samples can be scored as the options say.

    Prompts alone have a distance from the full adapter and no likelihood of anything.
    """
    if not samples:
        raise ValueError("no samples: there is nothing to calibrate with")
    if options.metric == KL_METRIC and options.method == "sweep":
        return
    for index, sample in enumerate(samples):
        if not sample.completion_token_ids:
            what = f"metric {options.metric!r}"
            if options.metric == KL_METRIC:
                what = f"method {options.method!r}"
            raise ValueError(
                f"{what} needs completions, and sample {index} has none: prompts alone can be "
                f"calibrated with metric {KL_METRIC!r} and method 'sweep'"
            )
