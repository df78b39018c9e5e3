"""Causal attention over whole sequences side by side, without a cache: what a sweep's forward pass needs.

Rows are padded on the right, where causal attention never looks, so no mask of the padding is needed;
what the padding's own positions put out is of no meaning.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from server.model.attention import AttentionVariant
from server.model.sdpa import attend


class DenseAttention:
    """`attention.Attention` for a batch whose number of rows may differ from layer to layer."""

    def __init__(self, num_rows: Callable[[int], int]) -> None:
        self._num_rows = num_rows
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `Attention.attend`; packed are `num_rows(layer_idx)` rows of equal length."""
        num_rows = self._num_rows(layer_idx)

        def by_row(packed: Tensor) -> Tensor:
            return packed.view(num_rows, -1, *packed.shape[1:]).transpose(1, 2)

        mask = self._mask(query, num_rows, variant.sliding_window)
        out = attend(by_row(query), by_row(key), by_row(value), mask, variant)
        return out.transpose(1, 2).flatten(0, 1)

    def _mask(self, query: Tensor, num_rows: int, window: int | None) -> Tensor | None:
        """bool `[1, 1, row_len, row_len]` where a window is shorter than the rows, else None: causal."""
        row_len = query.shape[0] // num_rows
        if window is None or window >= row_len:
            return None
        mask = self._masks.get((row_len, window))
        if mask is None:
            ones = torch.ones(1, 1, row_len, row_len, dtype=torch.bool, device=query.device)
            mask = self._masks[row_len, window] = ones.tril().triu(1 - window)
        return mask
