"""When masks that agree on their first layers share them: a plan to run many masks as one batch.

The rows of a batch are groups, one a distinct beginning of the masks. Masks that agree on layers
`< l` are one group up to there and fork before layer `l`. For the depths of a model this is a trunk,
which applies all LoRA, and one tail a depth, which leaves it before layer `depth` and runs on
without. Knows no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from boundary.mask import Mask


@dataclass(frozen=True, slots=True)
class ForkedLayer:
    """The groups of one layer. Those that apply its LoRA come first."""

    sources: tuple[int, ...]
    """For each group, which group of the layer before it continues."""
    num_lora_groups: int

    @property
    def num_groups(self) -> int:
        """How many times the batch runs through this layer."""
        return len(self.sources)


@dataclass(frozen=True, slots=True)
class ForkPlan:
    """Groups, layer by layer."""

    layers: tuple[ForkedLayer, ...]
    leaves: tuple[int, ...]
    """For each mask, its group after the last layer."""

    @classmethod
    def of(cls, masks: Sequence[Mask]) -> "ForkPlan":
        """The smallest plan for masks of one length, in any order, repeated ones shared."""
        layers: list[ForkedLayer] = []
        groups: dict[Mask, int] = {(): 0}
        for layer_idx in range(len(masks[0])):
            # Of each distinct beginning one, in the order of the masks, then LoRA before the rest.
            begins = list(dict.fromkeys(mask[: layer_idx + 1] for mask in masks))
            begins.sort(key=lambda begin: not begin[-1])
            sources = tuple(groups[begin[:-1]] for begin in begins)
            layers.append(ForkedLayer(sources, sum(begin[-1] for begin in begins)))
            groups = {begin: group for group, begin in enumerate(begins)}
        return cls(tuple(layers), tuple(groups[mask] for mask in masks))

    @property
    def num_layer_evaluations(self) -> int:
        """How many times a sample runs through a layer: `L(L+3)/2` for depths `0..L`."""
        return sum(layer.num_groups for layer in self.layers)
