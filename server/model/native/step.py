"""Paged attention on a CPU by compiled kernels, which read the cache where it lies.

`AttentionStep` gathers each sequence's blocks first, which moves all keys and values of the step once
more than the arithmetic needs: of a step of 16 rows at 96 tokens (12 layers x 768, float32, two cores)
that was a third. Prompts are attended there, too: of one of 512 tokens torch's SDPA took 1.7 times as long,
of eight of 64 tokens 1.3 times.
"""

from array import array
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

    def describe(self, run: Pass) -> "array[int]":
        """Tell a pass where each row writes and reads: neither this step nor what it returns may go first."""
        spans = array("q")
        for span in self.prefills:
            num_rows = span.end_row - span.start_row
            spans.extend((span.start_row, num_rows, span.kv_len, span.blocks.data_ptr()))
        run.spans, run.num_spans = spans.buffer_info()[0], len(self.prefills)
        run.slots = self.slot_mapping.data_ptr()
        run.kv_lens = self.decode_lens.data_ptr()
        run.block_table = self.decode_blocks.data_ptr()
        run.table_width = self.decode_blocks.shape[-1]
        return spans

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `Attention.attend`."""
        query, key, value = (
            rows if rows.stride(2) == 1 else rows.contiguous() for rows in (query, key, value)
        )
        layer = _Layer(self.cache, layer_idx, variant)
        layer.look_at(query.shape, query.stride(), key.stride(), value.stride())
        call = layer.call
        output = query.new_empty(*query.shape[:2], call.attention.value_dim)
        call.attention.out, call.attention.query = output.data_ptr(), query.data_ptr()
        call.key, call.value = key.data_ptr(), value.data_ptr()
        run = Pass()
        spans = self.describe(run)
        _library().run("fathom_attention_layer", call, torch.get_num_threads(), run)
        del spans  # the kernel has read them
        return output


class _Layer:
    """What attention in one layer is told of its cache and of how it differs from plain attention."""

    def __init__(self, cache: KVCache, layer_idx: int, variant: AttentionVariant) -> None:
        keys, values = cache.keys[layer_idx], cache.values[layer_idx]
        sinks = None if variant.sinks is None else variant.sinks.float().contiguous()
        self._held = keys, values, sinks
        self.call = AttentionLayer(
            attention=AttentionCall(
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
        )

    def look_at(
        self,
        size: Sequence[int],
        query_stride: Sequence[int],
        key_stride: Sequence[int],
        value_stride: Sequence[int],
    ) -> None:
        """Rows as `attend` is given them, the last axis of each contiguous. size: the query's."""
        call, attention = self.call, self.call.attention
        attention.num_rows, attention.num_heads, _ = size
        attention.query_row_stride, attention.query_head_stride, _ = query_stride
        call.key_row_stride, call.key_head_stride, _ = key_stride
        call.value_row_stride, call.value_head_stride, _ = value_stride


class BoundAttention(Bound):
    """One layer of a pass: writes its rows' keys and values, then attends."""

    def __init__(
        self, cache: KVCache, layer_idx: int, variant: AttentionVariant, operands: Sequence[Value]
    ) -> None:
        """operands: query, key, value and the output, as `attend` has them; `can_bind` approved them."""
        query, key, value, output = operands
        self._layer = _Layer(cache, layer_idx, variant)
        self._layer.look_at(query.size, query.stride, key.stride, value.stride)
        call = self._layer.call
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
