"""Decode attention over the paged cache in Triton, for recorded steps on CUDA devices.

One launch a layer writes the step's keys and values and attends each row to its history, whatever its
length: a program takes one row, the query heads that share one key head, and a part of the history, which
it reads through the block table a tile at a time with a running softmax (flash decoding). Where rows and
heads alone do not fill the device, histories are split, and a second launch joins the parts.

Nothing here is read on the host: how long a history is, where it lies and which rows are nobody's is in
tensors, so a step that was recorded once is right for whatever they hold. Rows beyond a history are never
read, so what a block held before does not matter.

Softcap, sinks, windows and every head width, in float32 sums. Importing this needs triton.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.model.attention import AttentionVariant
from server.model.decode_attention import DecodeRows
from server.model.kv_cache import KVCache

_TILE_BYTES = 16 << 10
"""Of keys, and as much of values, that a program holds at once."""
_WARPS, _STAGES = 4, 2
_LEAST_SPLIT = 64
"""Tokens of history: with fewer, the second launch costs more than the split saves."""
_PROGRAMS = 256
"""That fill a large device twice over."""


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    output, maxima, sums, query, key, value, keys, values, tables, kv_lens, sinks,
    scaling, softcap, window, split_len,
    query_row, query_head, key_row, key_head, value_row, value_head, table_row,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    KEY: tl.constexpr, KEY_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    kv_len = tl.load(kv_lens + row)
    last = kv_len - 1
    head = tl.arange(0, GROUP_PAD)
    is_head = head < GROUP
    key_dim = tl.arange(0, KEY_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    is_key_dim = key_dim < KEY
    is_value_dim = value_dim < VALUE
    queries = tl.load(
        query + row.to(tl.int64) * query_row
        + (kv_head * GROUP + head)[:, None] * query_head + key_dim[None, :],
        mask=is_head[:, None] & is_key_dim[None, :], other=0.0,
    ).to(FACTOR)  # fmt: skip
    own_key = tl.load(
        key + row.to(tl.int64) * key_row + kv_head * key_head + key_dim, mask=is_key_dim, other=0.0
    )
    own_value = tl.load(
        value + row.to(tl.int64) * value_row + kv_head * value_head + value_dim,
        mask=is_value_dim, other=0.0,
    )  # fmt: skip
    begin = split * split_len
    end = tl.minimum(begin + split_len, last)
    if HAS_WINDOW:
        first = tl.maximum(kv_len - window, 0)
        begin = tl.maximum(begin, first // TILE * TILE)
    maximum = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    result = tl.zeros((GROUP_PAD, VALUE_PAD), tl.float32)
    if HAS_SINKS:  # noqa: SIM102 -- the first is decided when the kernel is compiled
        if split == 0:
            maximum = tl.load(sinks + kv_head * GROUP + head, mask=is_head, other=0.0).to(
                tl.float32
            )
            total += 1.0
    if last // split_len == split:
        # The step's own token is seen by itself, and need not be read back.
        block = tl.load(tables + row.to(tl.int64) * table_row + last // SIZE).to(tl.int64)
        place = (block * SIZE + last % SIZE) * KV_HEADS + kv_head
        tl.store(keys + place * KEY + key_dim, own_key, mask=is_key_dim)
        tl.store(values + place * VALUE + value_dim, own_value, mask=is_value_dim)
        score = tl.sum(queries.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * scaling
        if HAS_SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        higher = tl.maximum(maximum, score)
        weight = tl.exp(score - higher)
        total = total * tl.exp(maximum - higher) + weight
        result = weight[:, None] * own_value.to(tl.float32)[None, :]
        maximum = higher
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        is_seen = position < end
        if HAS_WINDOW:
            is_seen &= position >= first
        block = tl.load(
            tables + row.to(tl.int64) * table_row + position // SIZE, mask=is_seen, other=0
        ).to(tl.int64)
        place = (block * SIZE + position % SIZE) * KV_HEADS + kv_head
        tile = tl.load(
            keys + place[:, None] * KEY + key_dim[None, :],
            mask=is_seen[:, None] & is_key_dim[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(tile.to(FACTOR)), input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        # Where nothing has been seen yet, both are -inf, whose difference is no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - shift[:, None])
        rescale = tl.exp(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        tile = tl.load(
            values + place[:, None] * VALUE + value_dim[None, :],
            mask=is_seen[:, None] & is_value_dim[None, :], other=0.0,
        )  # fmt: skip
        result = result * rescale[:, None]
        result = tl.dot(weights.to(FACTOR), tile.to(FACTOR), result, input_precision="ieee")
        maximum = higher
    part = (row.to(tl.int64) * HEADS + kv_head * GROUP + head) * NUM_SPLITS + split
    if NUM_SPLITS == 1:
        result = result / total[:, None]
    else:
        tl.store(maxima + part, maximum, mask=is_head)
        tl.store(sums + part, total, mask=is_head)
    tl.store(
        output + part[:, None] * VALUE + value_dim[None, :],
        result.to(output.dtype.element_ty),
        mask=is_head[:, None] & is_value_dim[None, :],
    )


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    output, parts, maxima, sums,
    NUM_SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # of all rows
    split = tl.arange(0, SPLITS_PAD)
    is_split = split < NUM_SPLITS
    dim = tl.arange(0, VALUE_PAD)
    is_dim = dim < VALUE
    own = head * NUM_SPLITS + split
    maximum = tl.load(maxima + own, mask=is_split, other=float("-inf"))
    weight = tl.exp(maximum - tl.max(maximum, 0))
    total = tl.sum(weight * tl.load(sums + own, mask=is_split, other=0.0), 0)
    part = tl.load(
        parts + own[:, None] * VALUE + dim[None, :],
        mask=is_split[:, None] & is_dim[None, :], other=0.0,
    )  # fmt: skip
    result = tl.sum(part * weight[:, None], 0) / total
    tl.store(output + head * VALUE + dim, result.to(output.dtype.element_ty), mask=is_dim)


@dataclass(frozen=True, slots=True)
class TritonDecode:
    """`decode_attention.DecodeAttention`."""

    name: ClassVar[str] = "triton"

    cache: KVCache
    block_tables: Tensor
    kv_lens: Tensor

    @classmethod
    def over(cls, cache: KVCache, rows: DecodeRows) -> Self:
        """See `DecodeAttention.over`."""
        return cls(cache, rows.block_tables, rows.kv_lens)

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `attention.Attention.attend`."""
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        query, key, value = (
            _with_dense_heads(query),
            _with_dense_heads(key),
            _with_dense_heads(value),
        )
        num_rows, num_heads, key_dim = query.shape
        _, num_kv_heads, value_dim = value.shape
        group = num_heads // num_kv_heads
        max_kv_len = self.block_tables.shape[1] * self.cache.block_size
        tile = _tile(max(key_dim, value_dim), query.element_size())
        num_splits = _num_splits(num_rows * num_kv_heads, max_kv_len)
        split_len = triton.cdiv(triton.cdiv(max_kv_len, num_splits), tile) * tile
        num_splits = triton.cdiv(max_kv_len, split_len)
        output = query.new_empty((num_rows, num_heads, value_dim))
        parts, maxima, sums = (
            output,
            self.kv_lens,
            self.kv_lens,
        )  # not written where nothing is split
        if num_splits > 1:
            shape = (num_rows, num_heads, num_splits)
            parts = query.new_empty((*shape, value_dim), dtype=torch.float32)
            maxima, sums = query.new_empty((2, *shape), dtype=torch.float32)
        _attend[(num_rows, num_kv_heads, num_splits)](
            parts, maxima, sums, query, key, value, keys, values, self.block_tables, self.kv_lens,
            self.kv_lens if variant.sinks is None else variant.sinks,
            variant.scaling, variant.softcap or 0.0, variant.sliding_window or 0, split_len,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), self.block_tables.stride(0),
            HEADS=num_heads, KV_HEADS=num_kv_heads, GROUP=group, GROUP_PAD=_padded(group),
            KEY=key_dim, KEY_PAD=_padded(key_dim), VALUE=value_dim, VALUE_PAD=_padded(value_dim),
            SIZE=self.cache.block_size, TILE=tile, NUM_SPLITS=num_splits,
            HAS_WINDOW=variant.sliding_window is not None,
            HAS_SOFTCAP=variant.softcap is not None, HAS_SINKS=variant.sinks is not None,
            FACTOR=_factor(query), num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
        if num_splits > 1:
            _join[(num_rows * num_heads,)](
                output, parts, maxima, sums,
                NUM_SPLITS=num_splits, SPLITS_PAD=int(triton.next_power_of_2(num_splits)),
                VALUE=value_dim, VALUE_PAD=_padded(value_dim),
            )  # fmt: skip
        return output


_FACTORS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _factor(tensor: Tensor) -> tl.dtype:
    """What is multiplied. A CPU is triton's interpreter, which cannot multiply bfloat16: there, wider."""
    return tl.float32 if tensor.device.type == "cpu" else _FACTORS[tensor.dtype]


def _with_dense_heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _padded(size: int) -> int:
    """As matrix instructions take it: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(size)))


def _tile(dim: int, element_size: int) -> int:
    """Tokens at once."""
    return max(16, min(64, _TILE_BYTES // (_padded(dim) * element_size)))


def _num_splits(num_programs: int, max_kv_len: int) -> int:
    """Parts of each history, before they are rounded to tiles. num_programs: without a split."""
    return max(1, min(_PROGRAMS // num_programs, max_kv_len // _LEAST_SPLIT))
