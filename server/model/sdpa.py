"""Attention by torch's SDPA, which runs wherever torch does; other backends are held against it.

Axis names: num_tokens (packed, all sequences), num_heads, num_kv_heads, head_dim, kv_len.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.model.attention import AttentionVariant
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: AttentionVariant
) -> Tensor:
    """Softmax attention with grouped heads, softcap and sinks.

    query `[batch, num_heads, num_queries, head_dim]`; key, value `[batch, num_kv_heads, kv_len, head_dim]`;
    mask bool, True where a query sees a key, broadcastable to `[batch, 1, num_queries, kv_len]`; None
    is causal when num_queries == kv_len and full otherwise. Returns like query.
    """
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    group = num_heads // num_kv_heads
    causal = mask is None and num_queries == kv_len > 1
    if variant.softcap is None and variant.sinks is None:
        if num_queries == 1 and group > 1:
            # The heads of a group become queries of their shared key head: keys are read once.
            grouped = query.reshape(batch, num_kv_heads, group, -1)
            out = scaled_dot_product_attention(
                grouped, key, value, attn_mask=mask, scale=variant.scaling
            )
            return out.reshape(batch, num_heads, 1, -1)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=variant.scaling,
            enable_gqa=group > 1,
        )
    if causal:
        ones = torch.ones(1, 1, num_queries, kv_len, dtype=torch.bool, device=query.device)
        mask = ones.tril()
    # [batch, num_kv_heads, group, num_queries, kv_len], in float32 as transformers' eager path does.
    grouped = query.reshape(batch, num_kv_heads, group, num_queries, -1)
    scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)).float() * variant.scaling
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks.float().view(1, num_kv_heads, group, 1, 1)
        scores = torch.cat([scores, sinks.expand(batch, -1, -1, num_queries, -1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :kv_len].to(value.dtype)
    out = torch.matmul(weights, value.unsqueeze(2))
    return out.reshape(batch, num_heads, num_queries, -1)


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence that computes several tokens in this step."""

    start_row: int
    end_row: int
    kv_len: int
    blocks: Tensor
    """int64 `[num_blocks]`, this sequence's own."""


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where each row of a step reads and writes the cache: gathers, then torch's SDPA. Runs anywhere."""

    name: ClassVar[str] = "sdpa"

    cache: KVCache
    slot_mapping: Tensor
    """int64 `[num_tokens]`: where each row writes, `block * block_size + offset`."""
    num_decodes: int
    decode_blocks: Tensor
    """int64 `[num_decodes, max_blocks]`, padded with each row's own first block."""
    decode_lens: Tensor
    """int64 `[num_decodes]`: keys of each decode row, its own included."""
    max_decode_len: int
    prefills: list[PrefillSpan]
    begun_blocks: Tensor | None = None
    """int64 `[num_begun]`: blocks that this step begins and does not fill. What they held before may
    not be finite, and a masked key or value that is not finite still spoils the row that reads it."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """Masks by first row (-1: the decode rows) and window, shared by the layers."""

    @classmethod
    def build(cls, cache: KVCache, batch: list[BatchedSequence], device: torch.device) -> Self:
        """Lay out a batch whose one-token sequences come first."""
        size = cache.block_size
        num_decodes = sum(len(sequence.token_ids) == 1 for sequence in batch)
        decodes = batch[:num_decodes]
        decode_lens = [sequence.num_kv_tokens for sequence in decodes]
        max_decode_len = max(decode_lens, default=0)
        width = cache.num_blocks_for(max_decode_len)
        # Padding is masked, yet it is read: another sequence's block might hold NaN.
        decode_blocks = [
            (sequence.block_table + sequence.block_table[:1] * width)[:width]
            for sequence in decodes
        ]
        begun_blocks = [
            sequence.block_table[sequence.num_kv_tokens // size]
            for sequence in batch
            if 0 < sequence.num_kv_tokens % size <= len(sequence.token_ids)
        ]
        prefills = []
        row = num_decodes
        for sequence in batch[num_decodes:]:
            end = row + len(sequence.token_ids)
            kv_len = sequence.num_kv_tokens
            blocks = _numbers(sequence.block_table[: cache.num_blocks_for(kv_len)], device)
            prefills.append(PrefillSpan(row, end, kv_len, blocks))
            row = end
        return cls(
            cache=cache,
            slot_mapping=_numbers(cache.slot_mapping(batch), device),
            num_decodes=num_decodes,
            decode_blocks=_numbers(decode_blocks, device),
            decode_lens=_numbers(decode_lens, device),
            max_decode_len=max_decode_len,
            prefills=prefills,
            begun_blocks=_numbers(begun_blocks, device) if begun_blocks else None,
        )

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `Attention.attend`."""
        self._write(layer_idx, key, value)
        parts = []
        if self.num_decodes:
            parts.append(self._attend_decodes(layer_idx, query[: self.num_decodes], variant))
        for span in self.prefills:
            rows = slice(span.start_row, span.end_row)
            parts.append(
                self._attend_prefill(layer_idx, query[rows], key[rows], value[rows], span, variant)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _write(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        if self.begun_blocks is not None:
            self.cache.clear(layer_idx, self.begun_blocks)
        self.cache.write(layer_idx, self.slot_mapping, key, value)

    def _attend_decodes(self, layer_idx: int, query: Tensor, variant: AttentionVariant) -> Tensor:
        keys, values = self.cache.gather(layer_idx, self.decode_blocks)
        keys, values = keys[:, : self.max_decode_len], values[:, : self.max_decode_len]
        mask = self._mask(
            -1,
            lambda: self.decode_lens.unsqueeze(1) - 1,
            self.max_decode_len,
            variant.sliding_window,
        )
        out = attend(
            query.unsqueeze(2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask[:, None, None],
            variant,
        )
        return out.squeeze(2)

    def _attend_prefill(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span: PrefillSpan,
        variant: AttentionVariant,
    ) -> Tensor:
        num_queries = span.end_row - span.start_row
        if num_queries < span.kv_len:
            cached_keys, cached_values = self.cache.gather(layer_idx, span.blocks)
            key, value = cached_keys[: span.kv_len], cached_values[: span.kv_len]
        window = variant.sliding_window
        mask = None
        if num_queries < span.kv_len or (window is not None and window < span.kv_len):
            first = span.kv_len - num_queries
            mask = self._mask(
                span.start_row,
                lambda: torch.arange(first, span.kv_len, device=query.device).unsqueeze(1),
                span.kv_len,
                window,
            )[None, None]
        out = attend(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            mask,
            variant,
        )
        return out[0].transpose(0, 1)

    def _mask(
        self, row: int, find_positions: Callable[[], Tensor], kv_len: int, window: int | None
    ) -> Tensor:
        """bool `[num_queries, kv_len]`, True where a query sees a key; made once a step.

        find_positions: the queries', `[num_queries, 1]`.
        """
        mask = self.masks.get((row, window))
        if mask is None:
            positions = find_positions()
            kv_positions = torch.arange(kv_len, device=positions.device)
            mask = kv_positions <= positions
            if window is not None:
                mask &= kv_positions > positions - window
            self.masks[row, window] = mask
        return mask


def _numbers(values: Any, device: torch.device) -> Tensor:
    """int64, of a list or of one of lists. By NumPy: a decode step on a CPU makes several of these."""
    return torch.from_numpy(np.array(values, np.int64)).to(device)
