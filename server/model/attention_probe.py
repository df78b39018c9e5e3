"""What a model's attention modules ask for, learned by one forward pass over them."""

from torch import Tensor

from server.model.attention import AttentionVariant
from server.model.kv_cache import KVSpec
from server.model.sdpa import attend


class AttentionProbe:
    """Plain causal attention over one sequence that notes what each layer asks for.

    The loader runs one forward with it to learn the cache's shape and which layers have attention.
    """

    def __init__(self) -> None:
        self.specs: dict[int, KVSpec] = {}
        self.variants: dict[int, AttentionVariant] = {}
        self.calls: list[int] = []

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `Attention.attend`."""
        self.calls.append(layer_idx)
        self.variants[layer_idx] = variant
        self.specs[layer_idx] = KVSpec(key.shape[1], key.shape[2], value.shape[2])
        out = attend(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            None,
            variant,
        )
        return out[0].transpose(0, 1)
