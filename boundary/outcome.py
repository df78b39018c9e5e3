"""What a calibration finds beside the depth: controls of equal budget, and generated texts.

Plain results, made by `calibrate` and shown by `report`; no model, tensor or file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from boundary.mask import Mask
from boundary.selection import Interval


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
