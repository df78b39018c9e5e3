"""Paged attention by torch's own flash-attention kernel, where a CUDA device has it.

One call a layer covers decode rows and prefill chunks alike and reads the cache through the block
table, so nothing is gathered. `why_not` says where it cannot stand in for `attention.AttentionStep`;
the self-test has the last word, and where it fails that one serves.
"""

import inspect
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from server.errors import ModelError
from server.model.attention import AttentionVariant
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache, KVSpec

BLOCK_SIZE = 256
"""The kernel's page size must be a multiple of this."""

_MAX_HEAD_DIM = 256


def why_not(
    device: torch.device,
    dtype: torch.dtype,
    specs: list[KVSpec],
    variants: list[AttentionVariant],
    block_size: int | None,
) -> str | None:
    """The reason this kernel cannot serve a model, None when it can. block_size: None is free to choose."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    missing = {"block_table", "seqused_k", "enable_gqa"} - set(
        inspect.signature(varlen_attn).parameters
    )
    if missing:
        return f"this torch's varlen_attn lacks {', '.join(sorted(missing))}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if any(variant.softcap is not None or variant.sinks is not None for variant in variants):
        return "it has no softcap and no attention sinks"
    if any(
        spec.key_dim != spec.value_dim or spec.key_dim % 8 or spec.key_dim > _MAX_HEAD_DIM
        for spec in specs
    ):
        return (
            f"heads must have one width for keys and values, a multiple of 8 up to {_MAX_HEAD_DIM}"
        )
    if block_size is not None and block_size % BLOCK_SIZE:
        return f"block_size {block_size} is not a multiple of {BLOCK_SIZE}"
    return None


@dataclass(frozen=True, slots=True)
class VarlenStep:
    """Where each row of a step reads and writes the cache, as the kernel takes it."""

    name: ClassVar[str] = "flash"

    cache: KVCache
    slot_mapping: Tensor
    """int64 `[num_tokens]`: where each row writes, `block * block_size + offset`."""
    query_starts: Tensor
    """int32 `[num_seqs + 1]`: the first row of each sequence, then the number of rows."""
    kv_starts: Tensor
    """int32 `[num_seqs + 1]`: the same over keys."""
    kv_lens: Tensor
    """int32 `[num_seqs]`: keys each sequence has in the cache, this step's included."""
    block_tables: Tensor
    """int32 `[num_seqs, max_blocks]`, padded with block 0."""
    max_query_len: int
    max_kv_len: int

    @classmethod
    def build(cls, cache: KVCache, batch: list[BatchedSequence], device: torch.device) -> Self:
        """Lay out a batch in any order."""
        kv_lens = [sequence.num_kv_tokens for sequence in batch]
        query_lens = [len(sequence.token_ids) for sequence in batch]
        width = cache.num_blocks_for(max(kv_lens))

        def int32(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return cls(
            cache=cache,
            slot_mapping=torch.tensor(cache.slot_mapping(batch), device=device),
            query_starts=int32([0, *accumulate(query_lens)]),
            kv_starts=int32([0, *accumulate(kv_lens)]),
            kv_lens=int32(kv_lens),
            block_tables=int32(
                [(sequence.block_table + [0] * width)[:width] for sequence in batch]
            ),
            max_query_len=max(query_lens),
            max_kv_len=max(kv_lens),
        )

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `attention.Attention.attend`."""
        if variant.softcap is not None or variant.sinks is not None:
            raise ModelError("flash attention has no softcap and no sinks")
        self.cache.write(layer_idx, self.slot_mapping, key, value)
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        # Left of itself a token sees `sliding_window - 1` others; -1 is all of them. Right: none, which
        # need not be said of a last token; and unless it is left unsaid the kernel neither reads the
        # keys once for the heads that share them nor splits a long history between processors.
        left = -1 if variant.sliding_window is None else variant.sliding_window - 1
        right = -1 if left == -1 and self.max_query_len == 1 else 0
        output = varlen_attn(
            query.contiguous(),
            keys,
            values,
            self.query_starts,
            self.kv_starts,
            self.max_query_len,
            self.max_kv_len,
            scale=variant.scaling,
            window_size=(left, right),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.kv_lens,
            block_table=self.block_tables,
        )
        assert isinstance(output, Tensor)  # a tuple only where auxiliary outputs are asked for
        return output
