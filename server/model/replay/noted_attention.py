"""Attention on a tape: one call a layer, whatever it does inside."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from server.model.attention import AttentionVariant
from server.model.replay.tape import noted_call


@dataclass(frozen=True, slots=True)
class NotedAttention:
    """`attention.Attention` whose calls are made again as they are."""

    function: Callable[..., Tensor]
    """Another's `attend`."""

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `attention.Attention.attend`."""
        return noted_call(self.function, layer_idx, query, key, value, variant)
