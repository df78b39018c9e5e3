"""The forward passes of one calibration, in slices: scores, lens and norms, none made twice.

Knows what was measured of which sample and what it took; `calibrate` knows what for.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from boundary.diagnostics import logit_lens_slices, lora_output_norms_slices
from boundary.mask import Mask
from boundary.progress import Progress
from boundary.rows import LoraRows
from boundary.sample import Sample
from boundary.score import Score
from boundary.sweep import Scores, sweep_slices

Floats = NDArray[np.float64]
Found = TypeVar("Found")


class Passes:
    """What may be asked of one model about one list of samples; arguments as of `sweep_slices`."""

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        rows: LoraRows,
        max_tokens: int | Callable[[], int],
        max_logits: int,
    ) -> None:
        self._model = model
        self._samples = samples
        self._rows = rows
        self._max_tokens = max_tokens
        self._max_logits = max_logits
        self._lens: dict[int, Floats] = {}
        self._norms: dict[int, Floats] = {}
        self.num_layer_evaluations: dict[str, int] = {}
        """By stage, in passes of one sample through one decoder layer."""

    def scores(
        self, score: Score, masks: Sequence[Mask] | None, stage: str
    ) -> Generator[Progress, None, Scores]:
        """`[num_samples, num_masks]`, higher is better."""
        found = yield from self._counted(
            sweep_slices(
                self._model, self._samples, score=score, masks=masks, rows=self._rows,
                max_tokens=self._max_tokens, max_logits=self._max_logits, stage=stage,
            )
        )  # fmt: skip
        # A score that compares with full is a distance. Taken from 0, for which there is no -0.
        return 0.0 - found if score.needs_full else found

    def lens(self, indices: Sequence[int]) -> Generator[Progress, None, Floats]:
        """`[len(indices), 2, num_layers]`: of each sample, the lens of base and full."""
        new = [index for index in indices if index not in self._lens]
        if new:
            lens = yield from self._counted(
                logit_lens_slices(
                    self._model, [self._samples[index] for index in new],
                    rows=self._rows, max_logits=self._max_logits,
                )
            )  # fmt: skip
            self._lens |= zip(new, np.stack([lens.base, lens.full], axis=1), strict=True)
        return np.stack([self._lens[index] for index in indices])

    def norms(self, indices: Sequence[int]) -> Generator[Progress, None, Floats]:
        """`[len(indices), num_layers]`"""
        new = [index for index in indices if index not in self._norms]
        if new:
            norms = yield from self._counted(
                lora_output_norms_slices(
                    self._model, [self._samples[index] for index in new],
                    rows=self._rows, max_logits=self._max_logits,
                )
            )  # fmt: skip
            self._norms |= zip(new, norms, strict=True)
        return np.stack([self._norms[index] for index in indices])

    def _counted(
        self, slices: Generator[Progress, None, Found]
    ) -> Generator[Progress, None, Found]:
        """The same slices, whose layer evaluations are added up by stage."""
        before = 0
        while True:
            try:
                progress = next(slices)
            except StopIteration as end:
                found: Found = end.value
                return found
            counts, now = self.num_layer_evaluations, progress.num_layer_evaluations
            counts[progress.stage] = counts.get(progress.stage, 0) + now - before
            before = now
            yield progress
