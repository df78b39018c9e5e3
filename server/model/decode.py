"""A decode step in tensors that never move: one token a sequence, filled anew for every step.

What `runner` computes from Python values for each step, `graphs` cannot: a recorded step reads the
same memory each time it runs. So its inputs lie here, as many rows as a step may have, and rows that
no sequence fills belong to nobody: they carry the base model and write to the cache's scratch block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.errors import ModelError
from server.model.attention import Attention, AttentionVariant, StepLayout, attend
from server.model.batch import BatchedSequence
from server.model.gathered_kernel import Rows
from server.model.kv_cache import KVCache
from server.model.varlen import VarlenStep

_TOKEN, _POSITION, _PLACE, _BEGUN, _SOURCE = range(5)
_SLOT, _DEPTH, _KV_LEN, _KV_START = range(4)


@dataclass(frozen=True, slots=True)
class Fed:
    """Tokens that only the device knows yet: row `i` of a step takes `token_ids[rows[i]]`."""

    token_ids: Tensor
    """int64 `[num_drawn]`, on the device."""
    rows: list[int]


class DecodeInputs:
    """The inputs of up to `max_rows` one-token sequences of up to `max_blocks` blocks."""

    def __init__(
        self, cache: KVCache, max_rows: int, max_blocks: int, device: torch.device
    ) -> None:
        if cache.scratch_block is None:
            raise ModelError("a cache without a scratch block has no place for rows of nobody")
        self.max_rows = max_rows
        self.max_blocks = max_blocks
        self.cache = cache
        self._scratch = cache.scratch_block
        is_cuda = device.type == "cuda"

        def pair(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
            # Only from pinned memory does a copy not wait for the device.
            host = torch.zeros(shape, dtype=dtype, pin_memory=is_cuda)
            return host, torch.zeros(shape, dtype=dtype, device=device)

        self._host_ids, self._ids = pair(torch.int64, 5, max_rows)
        self._host_rows, self._rows = pair(torch.int32, 4, max_rows + 1)
        self._host_tables, self._tables = pair(torch.int32, max_rows, max_blocks)
        self._query_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._was_copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def fill(self, batch: Sequence[BatchedSequence], num_rows: int, fed: Fed | None = None) -> None:
        """Write a step of `num_rows` rows, of which the first are `batch`'s.

        fed: their tokens, in place of what the batch says.
        """
        if self._was_copied is not None:
            self._was_copied.synchronize()  # the last step's copies may not have read all yet
        size, num_own = self.cache.block_size, len(batch)
        ids, rows, tables = (
            host.numpy() for host in (self._host_ids, self._host_rows, self._host_tables)
        )
        tables[:num_rows] = self._scratch
        ids[[_TOKEN, _POSITION], num_own:num_rows] = 0
        ids[_PLACE, num_own:num_rows] = self._scratch * size
        ids[_BEGUN, num_own:num_rows] = self._scratch
        rows[_SLOT, num_own:num_rows] = -1
        rows[_DEPTH, num_own:num_rows] = 0
        rows[_KV_LEN, num_own:num_rows] = 1
        for row, sequence in enumerate(batch):
            position = sequence.start
            block = sequence.block_table[position // size]
            num_blocks = position // size + 1
            tables[row, :num_blocks] = sequence.block_table[:num_blocks]
            begun = block if position % size == 0 else self._scratch
            ids[:_SOURCE, row] = (
                sequence.token_ids[0],
                position,
                block * size + position % size,
                begun,
            )
            rows[:_KV_START, row] = (sequence.slot, sequence.depth, position + 1)
        rows[_KV_START, 0] = 0
        np.cumsum(rows[_KV_LEN, :num_rows], out=rows[_KV_START, 1 : num_rows + 1])
        if fed is not None:
            ids[_SOURCE, :num_own] = fed.rows
        self._ids.copy_(self._host_ids, non_blocking=True)
        self._rows.copy_(self._host_rows, non_blocking=True)
        self._tables[:num_rows].copy_(self._host_tables[:num_rows], non_blocking=True)
        if self._was_copied is not None:
            self._was_copied.record()
        if fed is not None:
            sources = self._ids[_SOURCE, :num_own]
            torch.index_select(fed.token_ids, 0, sources, out=self._ids[_TOKEN, :num_own])

    def token_ids(self, num_rows: int) -> Tensor:
        """int64 `[1, num_rows]`"""
        return self._ids[_TOKEN : _TOKEN + 1, :num_rows]

    def positions(self, num_rows: int) -> Tensor:
        """int64 `[1, num_rows]`"""
        return self._ids[_POSITION : _POSITION + 1, :num_rows]

    def adapters(self, num_rows: int) -> Rows:
        """Each row's slot and depth."""
        return Rows(self._rows[_SLOT, :num_rows], self._rows[_DEPTH, :num_rows])

    def attention(self, layout: type[StepLayout], num_rows: int, num_blocks: int) -> Attention:
        """A fresh attention over these inputs, for sequences of up to `num_blocks` blocks.

        Fresh for every recording: what one computes once a step and keeps (a mask) is part of it.
        """
        places = self._ids[_PLACE, :num_rows]
        tables = self._tables[:num_rows, :num_blocks]
        kv_lens = self._rows[_KV_LEN, :num_rows]
        if layout is VarlenStep:
            return VarlenStep(
                cache=self.cache,
                slot_mapping=places,
                query_starts=self._query_starts[: num_rows + 1],
                kv_starts=self._rows[_KV_START, : num_rows + 1],
                kv_lens=kv_lens,
                block_tables=tables,
                max_query_len=1,
                max_kv_len=num_blocks * self.cache.block_size,
            )
        begun = self._ids[_BEGUN, :num_rows]
        return GatheredDecode(self.cache, places, begun, tables, kv_lens, {})


@dataclass(frozen=True, slots=True)
class GatheredDecode:
    """Attention by torch's SDPA over gathered blocks, where the flash kernel cannot serve."""

    cache: KVCache
    slot_mapping: Tensor
    """int64 `[num_rows]`: where each row writes."""
    begun_blocks: Tensor
    """int64 `[num_rows]`: the block that a row is the first to write to, else the scratch block. What
    it held before may not be finite, and spoils the row that reads it even where it is masked."""
    block_tables: Tensor
    """int32 `[num_rows, num_blocks]`, padded with the scratch block."""
    kv_lens: Tensor
    """int32 `[num_rows]`"""
    masks: dict[int | None, Tensor]
    """bool `[num_rows, 1, 1, kv_len]` by window, shared by the layers of one pass."""

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `attention.Attention.attend`."""
        self.cache.clear(layer_idx, self.begun_blocks)
        self.cache.write(layer_idx, self.slot_mapping, key, value)
        keys = self._gather(self.cache.keys[layer_idx])
        values = self._gather(self.cache.values[layer_idx])
        mask = self._mask(keys.shape[2], variant.sliding_window)
        return attend(query.unsqueeze(2), keys, values, mask, variant).squeeze(2)

    def _gather(self, pool: Tensor) -> Tensor:
        """`[num_rows, num_kv_heads, kv_len, head_dim]`, in memory of the step's own: the workspace that
        other steps share is let go when it grows, and a recorded step would write to it still."""
        num_rows, num_blocks = self.block_tables.shape
        blocks = pool.index_select(0, self.block_tables.flatten())
        kv_len = num_blocks * pool.shape[1]
        return blocks.view(num_rows, kv_len, *pool.shape[2:]).transpose(1, 2)

    def _mask(self, kv_len: int, window: int | None) -> Tensor:
        mask = self.masks.get(window)
        if mask is None:
            kv_positions = torch.arange(kv_len, device=self.kv_lens.device)
            ends = self.kv_lens.unsqueeze(1)
            mask = kv_positions < ends
            if window is not None:
                mask &= kv_positions >= ends - window
            mask = self.masks[window] = mask[:, None, None]
        return mask
