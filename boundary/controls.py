"""Other ways to spend as many layers as a depth does, which show whether the lowest are the ones.

`top_k`: the layers whose LoRA puts out the most (as LoRA-drop ranks them, arXiv 2402.07721).
`random_k`: layers by lot, several draws averaged sample by sample. Knows no model.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from boundary.intervals import Interval
from boundary.mask import Mask
from boundary.outcome import ControlResult
from boundary.selection import Selection, compare_controls

Floats = NDArray[np.float64]


def budget_of(depth: int, lora_layers: Sequence[int]) -> int:
    """How many layers with LoRA lie below this depth; 0 also if that leaves nothing to choose."""
    budget = sum(layer_idx < depth for layer_idx in lora_layers)
    return budget if budget < len(lora_layers) else 0


def control_masks(
    budget: int, lora_layers: Sequence[int], norms: Floats, seed: int, num_random_masks: int
) -> dict[str, tuple[Mask, ...]]:
    """`budget` layers of those with LoRA, by name of the control.

    norms: float64 `[num_layers]`, how much each layer's LoRA puts out; the lower of equal ones wins.
    """

    def mask(layers: Sequence[int]) -> Mask:
        return tuple(layer_idx in layers for layer_idx in range(len(norms)))

    masks: dict[str, tuple[Mask, ...]] = {
        "top_k": (mask(sorted(lora_layers, key=lambda i: -norms[i])[:budget]),)
    }
    rng = np.random.default_rng([seed, 2])
    draws = [rng.choice(lora_layers, budget, replace=False) for _ in range(num_random_masks)]
    if draws:
        masks["random_k"] = tuple(mask(draw.tolist()) for draw in draws)
    return masks


def control_results(
    selection: Selection,
    chosen: Mask,
    masks: Mapping[str, tuple[Mask, ...]],
    scores: Mapping[Mask, Floats],
) -> dict[str, ControlResult]:
    """Each control's mean score, and how the proposed depth differs from it.

    chosen: the proposed depth's layers with LoRA. scores: `[num_samples]` of each mask.
    """
    by_name = {
        name: np.mean([scores[mask] for mask in drawn], axis=0) for name, drawn in masks.items()
    }
    # The same layers are the same model: it ties with itself, which is no lack of evidence.
    others = {name: by_name[name] for name in masks if set(masks[name]) != {chosen}}
    differences = compare_controls(selection, scores[chosen], others)
    return {
        name: ControlResult(
            mean=float(values.mean()),
            difference=differences.get(name, Interval(0.0, 0.0, 0.0)),
            masks=masks[name],
        )
        for name, values in by_name.items()
    }
