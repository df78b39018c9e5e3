"""Which layers of an adapter apply their LoRA, one by one: a depth is the mask that begins with ones.

Masks other than depths are controls: k layers chosen by another rule, or at random. LoRA of the
embedding goes with the first layer and LoRA of the output head with the last one, which for a depth
is what `boundary.depth` says. Knows no model.
"""

from collections.abc import Collection

Mask = tuple[bool, ...]
"""One truth value a decoder layer: does it apply its LoRA?"""


def depth_masks(num_layers: int) -> list[Mask]:
    """The masks of all depths, `0..num_layers`, in this order."""
    return [
        tuple(layer_idx < depth for layer_idx in range(num_layers))
        for depth in range(num_layers + 1)
    ]


def check_masks(masks: list[Mask], num_layers: int) -> None:
    """Raise ValueError unless there are masks and each has one value a layer."""
    if not masks:
        raise ValueError("no masks: there is nothing to score")
    for mask in masks:
        if len(mask) != num_layers:
            raise ValueError(f"a mask must have {num_layers} values, one a layer, got {len(mask)}")


def representative_depths(layers: Collection[int], num_layers: int) -> tuple[int, ...]:
    """For each depth 0 to `num_layers`, the smallest one that is the same model.

    layers: those that have LoRA; a depth that ends above a layer without any adds nothing.
    """
    found = [0]
    for depth in range(1, num_layers + 1):
        found.append(depth if depth - 1 in layers else found[-1])
    return tuple(found)
