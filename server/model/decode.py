"""A decode step in tensors that never move: one token a sequence, filled anew for every step.

What `runner` computes from Python values for each step, `graphs` cannot: a recorded step reads the
same memory each time it runs. So its inputs lie here, as many rows as a step may have, and rows that
no sequence fills belong to nobody: they carry the base model and write to the cache's scratch block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.errors import ModelError
from server.model.attention import Attention
from server.model.batch import BatchedSequence
from server.model.decode_attention import DecodeAttention, DecodeRows, GatheredDecode
from server.model.gathered_kernel import Rows
from server.model.kv_cache import KVCache

_TOKEN, _POSITION, _PLACE, _BEGUN, _SOURCE = range(5)
_SLOT, _DEPTH, _KV_LEN = range(3)


@dataclass(frozen=True, slots=True)
class Fed:
    """Tokens that only the device knows yet: row `i` of a step takes `token_ids[rows[i]]`."""

    token_ids: Tensor
    """int64 `[num_drawn]`, on the device."""
    rows: list[int]


class DecodeInputs:
    """The inputs of up to `max_rows` one-token sequences of up to `max_blocks` blocks."""

    def __init__(
        self,
        cache: KVCache,
        max_rows: int,
        max_blocks: int,
        device: torch.device,
        attention: type[DecodeAttention] = GatheredDecode,
    ) -> None:
        if cache.scratch_block is None:
            raise ModelError("a cache without a scratch block has no place for rows of nobody")
        self.max_rows = max_rows
        self.max_blocks = max_blocks
        self.cache = cache
        self._scratch = cache.scratch_block
        self._attention = attention
        is_cuda = device.type == "cuda"

        def pair(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
            # Only from pinned memory does a copy not wait for the device.
            host = torch.zeros(shape, dtype=dtype, pin_memory=is_cuda)
            return host, torch.zeros(shape, dtype=dtype, device=device)

        self._host_ids, self._ids = pair(torch.int64, 5, max_rows)
        self._host_rows, self._rows = pair(torch.int32, 3, max_rows)
        self._host_tables, self._tables = pair(torch.int32, max_rows, max_blocks)
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
            rows[:, row] = (sequence.slot, sequence.depth, position + 1)
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

    def attention(self, num_rows: int, num_blocks: int) -> Attention:
        """A fresh attention over these inputs, for sequences of up to `num_blocks` blocks.

        Fresh for every recording: what one computes once a step and keeps (a mask) is part of it.
        """
        rows = DecodeRows(
            places=self._ids[_PLACE, :num_rows],
            begun_blocks=self._ids[_BEGUN, :num_rows],
            block_tables=self._tables[:num_rows, :num_blocks],
            kv_lens=self._rows[_KV_LEN, :num_rows],
        )
        return self._attention.over(self.cache, rows)
