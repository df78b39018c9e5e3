"""The gathered LoRA kernel in Triton, for CUDA devices. Importing this needs triton; nothing else does.

Two launches: one shrinks the input of all modules that share it, one a module expands. A program
takes `BLOCK_ROWS` rows, and as the runner sorts rows by adapter these have few adapters: it goes from
adapter to adapter, so each adapter's weights are read once for all of its rows (Punica's SGMV,
arXiv 2310.18547) and a step of many adapters costs no more reads than it has adapters. Rows that do
not apply LoRA, and the ranks above an adapter's own, are never read; programs without a row leave.

The input's features are split between programs, and their parts are summed by who reads them: no
atomics, so a row's result is the same in every batch. Products run in the weights' dtype with float32
sums, float32 ones in full precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.model.gathered_kernel import DownProjections, Rows, UpProjection

BLOCK_ROWS = 16
"""The least that a matrix instruction takes."""
_MAX_SPLITS = 16
_FEATURES_PER_SPLIT = 512


@triton.jit
def _own_slots(slots, depths, ranks, row, num_rows, layer_idx):  # type: ignore[no-untyped-def]
    """Each row's slot, -1 where it does not apply LoRA."""
    is_row = row < num_rows
    slot = tl.load(slots + row, mask=is_row, other=-1)
    depth = tl.load(depths + row, mask=is_row, other=0)
    slot = tl.where(depth > layer_idx, slot, -1)
    rank = tl.load(ranks + slot, mask=slot >= 0, other=0)
    return tl.where(rank > 0, slot, -1)


@triton.jit(do_not_specialize=["layer_idx", "num_rows"])
def _shrink(  # type: ignore[no-untyped-def]
    x, lora_A, ranks, slots, depths, low_rank,
    layer_idx, num_rows, in_features, num_slots, stack_rank, num_splits,
    x_stride, module_stride, slot_stride,
    SPLIT: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    module = tl.program_id(1)
    split = tl.program_id(2)
    ranks += module * num_slots
    slot = _own_slots(slots, depths, ranks, row, num_rows, layer_idx)
    current = tl.max(slot, 0)
    if current < 0:
        return
    is_written = slot >= 0
    r = tl.arange(0, RANK)
    sums = tl.zeros((ROWS, RANK), tl.float32)
    while current >= 0:
        is_own = slot == current
        rank = tl.load(ranks + current)
        weights = lora_A + module.to(tl.int64) * module_stride + current.to(tl.int64) * slot_stride
        part = tl.zeros((ROWS, RANK), tl.float32)
        for start in range(0, SPLIT, BLOCK):
            k = split * SPLIT + start + tl.arange(0, BLOCK)
            is_feature = k < in_features
            inputs = tl.load(
                x + row[:, None].to(tl.int64) * x_stride + k[None, :],
                mask=is_own[:, None] & is_feature[None, :],
                other=0.0,
            )
            transposed = tl.load(
                weights + r[None, :] * in_features + k[:, None],
                mask=is_feature[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            part = tl.dot(inputs.to(FACTOR), transposed.to(FACTOR), part, input_precision="ieee")
        # A sum would carry an infinity of one adapter into its neighbours' zeros.
        sums = tl.where(is_own[:, None], part, sums)
        slot = tl.where(is_own, -1, slot)
        current = tl.max(slot, 0)
    place = (module * num_splits + split) * num_rows + row
    tl.store(
        low_rank + place[:, None] * stack_rank + r[None, :],
        sums,
        mask=is_written[:, None] & (r < stack_rank)[None, :],
    )


@triton.jit(do_not_specialize=["layer_idx", "num_rows"])
def _expand(  # type: ignore[no-untyped-def]
    output, low_rank, lora_B, ranks, scaling, bias, gain, base_bias, slots, depths,
    layer_idx, num_rows, out_features, stack_rank, output_stride, slot_stride,
    HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BASE_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = _own_slots(slots, depths, ranks, row, num_rows, layer_idx)
    current = tl.max(slot, 0)
    if current < 0:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < out_features
    is_changed = (slot >= 0)[:, None] & is_column[None, :]
    r = tl.arange(0, RANK)
    is_rank = (slot >= 0)[:, None] & (r < stack_rank)[None, :]
    low = tl.zeros((ROWS, RANK), tl.float32)
    for split in range(SPLITS):
        place = split * num_rows + row
        low += tl.load(low_rank + place[:, None] * stack_rank + r[None, :], mask=is_rank, other=0.0)
    low = low.to(lora_B.dtype.element_ty).to(FACTOR)
    places = output + row[:, None].to(tl.int64) * output_stride + column[None, :]
    y = tl.load(places, mask=is_changed, other=0.0).to(tl.float32)
    while current >= 0:
        is_own = (slot == current)[:, None]
        rank = tl.load(ranks + current)
        weights = lora_B + current.to(tl.int64) * slot_stride
        transposed = tl.load(
            weights + column[None, :] * stack_rank + r[:, None],
            mask=(r < rank)[:, None] & is_column[None, :],
            other=0.0,
        )
        delta = tl.dot(low, transposed.to(FACTOR), input_precision="ieee")
        own_vector = current.to(tl.int64) * out_features + column
        if HAS_BIAS:
            delta += tl.load(bias + own_vector, mask=is_column, other=0.0).to(tl.float32)[None, :]
        new = y + delta * tl.load(scaling + current)
        if HAS_GAIN:
            own_gain = tl.load(gain + own_vector, mask=is_column, other=1.0).to(tl.float32)[None, :]
            if HAS_BASE_BIAS:
                base = tl.load(base_bias + column, mask=is_column, other=0.0).to(tl.float32)[
                    None, :
                ]
                new = base + own_gain * (new - base)
            else:
                new = own_gain * new
        y = tl.where(is_own, new, y)
        slot = tl.where(slot == current, -1, slot)
        current = tl.max(slot, 0)
    tl.store(places, y.to(output.dtype.element_ty), mask=is_changed)


class TritonKernel:
    """`gathered_kernel.GatheredKernel` by two kernels of its own."""

    name = "triton"

    def shrink(self, x: Tensor, down: DownProjections, rows: Rows, layer_idx: int) -> Tensor:
        """See `GatheredKernel.shrink`. Columns past every adapter's own rank hold zeros."""
        num_modules, num_slots, stack_rank, in_features = down.lora_A.shape
        num_rows = x.shape[0]
        block = _block(stack_rank, x.element_size())
        num_splits = min(_MAX_SPLITS, triton.cdiv(in_features, _FEATURES_PER_SPLIT))
        split = triton.cdiv(triton.cdiv(in_features, num_splits), block) * block
        low_rank = x.new_empty((num_modules, num_splits, num_rows, stack_rank), dtype=torch.float32)
        grid = (triton.cdiv(num_rows, BLOCK_ROWS), num_modules, num_splits)
        _shrink[grid](
            x, down.lora_A, down.ranks, rows.slots, rows.depths, low_rank,
            layer_idx, num_rows, in_features, num_slots, stack_rank, num_splits,
            x.stride(0), down.lora_A.stride(0), down.lora_A.stride(1),
            SPLIT=split, RANK=_padded(stack_rank), ROWS=BLOCK_ROWS, BLOCK=block,
            FACTOR=_factor(x),
        )  # fmt: skip
        return low_rank

    def expand(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjection,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        """See `GatheredKernel.expand`."""
        _, out_features, stack_rank = up.lora_B.shape
        num_splits, num_rows, _ = low_rank.shape
        block = _block(stack_rank, output.element_size())
        block = min(block, 64 if out_features <= 4096 else 128)
        grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(out_features, block))
        nothing = up.scaling  # an address that is never read
        _expand[grid](
            output, low_rank, up.lora_B, up.ranks, up.scaling,
            nothing if up.bias is None else up.bias,
            nothing if up.gain is None else up.gain,
            nothing if base_bias is None else base_bias,
            rows.slots, rows.depths,
            layer_idx, num_rows, out_features, stack_rank, output.stride(0), up.lora_B.stride(0),
            HAS_BIAS=up.bias is not None, HAS_GAIN=up.gain is not None,
            HAS_BASE_BIAS=base_bias is not None,
            SPLITS=num_splits, RANK=_padded(stack_rank), ROWS=BLOCK_ROWS, BLOCK=block,
            FACTOR=_factor(up.lora_B),
        )  # fmt: skip


_FACTORS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _factor(tensor: Tensor) -> tl.dtype:
    """What is multiplied. A CPU is triton's interpreter, which cannot multiply bfloat16: there, wider."""
    return tl.float32 if tensor.device.type == "cpu" else _FACTORS[tensor.dtype]


def _padded(rank: int) -> int:
    """The rank as matrix instructions take it: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(rank)))


def _block(rank: int, element_size: int) -> int:
    """Features in one tile: a tile of weights stays within 32 KiB of a processor's shared memory."""
    return max(16, min(128, (32 << 10) // (_padded(rank) * element_size)))
