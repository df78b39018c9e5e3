"""Paged attention on a CPU whose decode rows read the cache where it lies, by the compiled kernel.

`AttentionStep` gathers each sequence's blocks first, which moves all keys and values of the step once
more than the arithmetic needs: of a step of 16 rows at 96 tokens (12 layers x 768, float32, two cores)
that was a third. Prefill rows are attended as there: their products are large enough for torch's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from server.model.attention import AttentionVariant
from server.model.kv_cache import KVCache, KVSpec
from server.model.native.library import Library, load
from server.model.native.structures import DTYPES, AttentionCall, AttentionLayer, Pass
from server.model.replay.bound import Bound
from server.model.replay.tape import Value
from server.model.sdpa import AttentionStep

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

    def describe(self, run: Pass) -> None:
        """Tell a pass of decode rows alone where each writes and reads; it must not outlive this step."""
        run.slots = self.slot_mapping.data_ptr()
        run.kv_lens = self.decode_lens.data_ptr()
        run.block_table = self.decode_blocks.data_ptr()
        run.table_width = self.decode_blocks.shape[-1]

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
        query = query if query.stride(2) == 1 else query.contiguous()
        layer = _Layer(self.cache, layer_idx, variant)
        output = query.new_empty(*query.shape[:2], layer.call.value_dim)
        call = layer.call
        layer.look_at(query.shape, query.stride())
        call.out, call.query = output.data_ptr(), query.data_ptr()
        call.kv_lens, call.block_table = self.decode_lens.data_ptr(), self.decode_blocks.data_ptr()
        call.table_width = self.decode_blocks.shape[-1]
        _library().run("fathom_attend", call, torch.get_num_threads())
        return output


class _Layer:
    """What attention in one layer is told of its cache and of how it differs from plain attention."""

    def __init__(self, cache: KVCache, layer_idx: int, variant: AttentionVariant) -> None:
        keys, values = cache.keys[layer_idx], cache.values[layer_idx]
        sinks = None if variant.sinks is None else variant.sinks.float().contiguous()
        self._held = keys, values, sinks
        self.call = AttentionCall(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            block_size=cache.block_size,
            num_kv_heads=keys.shape[2],
            head_dim=keys.shape[3],
            value_dim=values.shape[3],
            window=variant.sliding_window or 0,
            scaling=variant.scaling,
            softcap=variant.softcap or 0.0,
            sinks=None if sinks is None else sinks.data_ptr(),
            dtype=DTYPES[keys.dtype],
        )

    def look_at(self, size: Sequence[int], stride: Sequence[int]) -> None:
        """A query `[num_seqs, num_heads, head_dim]`, its last axis contiguous."""
        self.call.num_seqs, self.call.num_heads, _ = size
        self.call.query_seq_stride, self.call.query_head_stride, _ = stride


class BoundAttention(Bound):
    """One layer of a pass of decode rows: writes their keys and values, then attends."""

    def __init__(
        self, cache: KVCache, layer_idx: int, variant: AttentionVariant, operands: Sequence[Value]
    ) -> None:
        """operands: query, key, value and the output, as `attend` has them; `can_bind` approved them."""
        query, key, value, output = operands
        self._layer = _Layer(cache, layer_idx, variant)
        self._layer.look_at(query.size, query.stride)
        call = AttentionLayer(
            attention=self._layer.call,
            key_token_stride=key.stride[0],
            key_head_stride=key.stride[1],
            value_token_stride=value.stride[0],
            value_head_stride=value.stride[1],
        )
        fields = (
            (call.attention, "query"),
            (call, "key"),
            (call, "value"),
            (call.attention, "out"),
        )
        super().__init__("fathom_attention_layer", call, operands, fields, (output,))

    @staticmethod
    def can_bind(operands: Sequence[Value]) -> bool:
        """Whether the kernel reads them as they lie."""
        *given, output = operands
        _, num_heads, value_dim = output.size
        is_whole = output.stride == (num_heads * value_dim, value_dim, 1)
        return is_whole and all(value.stride[2] == 1 for value in given)


def _library() -> Library:
    library = load()
    assert isinstance(library, Library)  # `why_not` was asked before
    return library
