"""Paged attention on a CPU whose decode rows read the cache where it lies, by the compiled kernel.

`AttentionStep` gathers each sequence's blocks first, which moves all keys and values of the step once
more than the arithmetic needs: of a step of 16 rows at 96 tokens (12 layers x 768, float32, two cores)
that was a third. Prefill rows are attended as there: their products are large enough for torch's own.
"""

from ctypes import byref
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from server.model.attention import AttentionStep, AttentionVariant
from server.model.kv_cache import KVSpec
from server.model.native.library import DTYPES, AttentionCall, Library, load

_HEAD_DIM_MULTIPLE = 16
"""The widest vector's lanes: a head is read in whole vectors."""


def why_not(device: torch.device, dtype: torch.dtype, specs: list[KVSpec]) -> str | None:
    """The reason this backend cannot serve a model, None when it can."""
    library = load()
    if isinstance(library, str):
        return library
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"it reads float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if any(
        spec.key_dim % _HEAD_DIM_MULTIPLE or spec.value_dim % _HEAD_DIM_MULTIPLE for spec in specs
    ):
        return f"heads must be a multiple of {_HEAD_DIM_MULTIPLE} wide"
    return None


@dataclass(frozen=True, slots=True)
class NativeStep(AttentionStep):
    """An `AttentionStep` on a model that `why_not` has nothing against."""

    name: ClassVar[str] = "native"

    call: AttentionCall = field(init=False)
    """What is the same for every layer, filled once."""
    kv_lens: Tensor = field(init=False)
    """int64 `[num_decodes]`: keys of each decode row, its own included."""

    def __post_init__(self) -> None:
        kv_lens = self.decode_positions.flatten() + 1
        object.__setattr__(self, "kv_lens", kv_lens)
        call = AttentionCall(
            block_table=self.decode_blocks.data_ptr(),
            kv_lens=kv_lens.data_ptr(),
            table_width=self.decode_blocks.shape[-1],
            block_size=self.cache.block_size,
            num_seqs=self.num_decodes,
            num_threads=torch.get_num_threads(),
        )
        object.__setattr__(self, "call", call)

    def _write(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        # What a block holds beyond its sequence's tokens is never read here, so it is not cleared.
        write = _library().functions.fathom_write_kv
        for pool, rows in (
            (self.cache.keys[layer_idx], key),
            (self.cache.values[layer_idx], value),
        ):
            rows = rows if rows.stride(2) == 1 else rows.contiguous()
            write(
                pool.data_ptr(),
                rows.data_ptr(),
                rows.stride(0),
                rows.stride(1),
                self.slot_mapping.data_ptr(),
                *rows.shape,
                DTYPES[pool.dtype],
            )

    def _attend_decodes(self, layer_idx: int, query: Tensor, variant: AttentionVariant) -> Tensor:
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        query = query if query.stride(2) == 1 else query.contiguous()
        num_seqs, num_heads, head_dim = query.shape
        output = query.new_empty(num_seqs, num_heads, values.shape[3])
        sinks = None if variant.sinks is None else variant.sinks.float().contiguous()
        call = self.call
        call.out, call.query = output.data_ptr(), query.data_ptr()
        call.query_seq_stride, call.query_head_stride = query.stride(0), query.stride(1)
        call.keys, call.values = keys.data_ptr(), values.data_ptr()
        call.num_heads, call.num_kv_heads = num_heads, keys.shape[2]
        call.head_dim, call.value_dim = head_dim, values.shape[3]
        call.window = variant.sliding_window or 0
        call.scaling, call.softcap = variant.scaling, variant.softcap or 0.0
        call.sinks = None if sinks is None else sinks.data_ptr()
        call.dtype = DTYPES[query.dtype]
        _library().functions.fathom_attend_decodes(byref(call))
        return output


def _library() -> Library:
    library = load()
    assert isinstance(library, Library)  # `why_not` was asked before
    return library
