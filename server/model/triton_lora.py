"""The gathered LoRA kernel in Triton, for CUDA devices. Importing this needs triton; nothing else does.

Two launches for modules whose outputs are columns of one product: one shrinks their input, one expands. A
program takes `BLOCK_ROWS` rows, and as the runner sorts rows by adapter these have few adapters: it goes
from adapter to adapter, so each adapter's weights are read once for all of its rows (Punica's SGMV,
arXiv 2310.18547) and a step of many adapters costs no more reads than it has adapters. So that adapters of
the same rows do not wait for each other, several programs take turns at them. Rows that do not apply LoRA,
and the ranks above an adapter's own (rounded up to `_VECTOR`), are never read; programs without a row leave.

The input's features are split between programs, and their parts are summed by who reads them: no
atomics, so a row's result is the same in every batch. Products run in the weights' dtype with float32
sums, float32 ones in full precision. Masks are multiples of `_VECTOR` where sizes are, as only then the
compiler reads 16 bytes at once.

Where a device can (Hopper and later), expanding is launched while shrinking still runs ("programmatic
dependent launch" in CUDA's programming guide): its programs read their weights meanwhile, and wait for
the low ranks alone.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.model import lora_tiles as tiles
from server.model import triton_fetch
from server.model.gathered_kernel import DownProjections, Rows, UpProjections
from server.model.triton_fetch import launches_overlap

_VECTOR = tl.constexpr(8)
"""Ranks: 16 bytes of bfloat16."""


@triton.jit
def _own_slots(slots, depths, rank, row, num_rows, layer_idx, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each row's slot, -1 where it does not apply LoRA. rank: of each slot."""
    is_row = row < num_rows
    slot = tl.load(slots + row, mask=is_row, other=-1)
    depth = tl.load(depths + row, mask=is_row, other=0)
    # From registers: a load that waits for another one costs more than the whole comparison.
    is_its = slot[:, None] == tl.arange(0, SLOTS)[None, :]
    own_rank = tl.sum(tl.where(is_its, rank[None, :], 0), 1)
    return tl.where((depth > layer_idx) & (own_rank > 0), slot, -1)


@triton.jit
def _rank_of(rank, slot, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As far as it is read: a multiple of `_VECTOR`."""
    own = tl.sum(tl.where(tl.arange(0, SLOTS) == slot, rank, 0), 0)
    return (own + _VECTOR - 1) // _VECTOR * _VECTOR


@triton.jit
def _ranks_of(ranks, module, num_slots, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 `[SLOTS]`, 0 past the last slot."""
    slot = tl.arange(0, SLOTS)
    return tl.load(ranks + module * num_slots + slot, mask=slot < num_slots, other=0)


@triton.jit
def _without(slot, num_adapters, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows' slots without those of the first so many adapters, which are `MOST` or fewer."""
    for index in tl.static_range(MOST):
        slot = tl.where((slot == tl.max(slot, 0)) & (index < num_adapters), -1, slot)
    return slot


@triton.jit(do_not_specialize=["layer_idx", "num_rows"])
def _shrink(  # type: ignore[no-untyped-def]
    x, lora_A, ranks, slots, depths, low_rank,
    layer_idx, num_rows, in_features, num_slots, num_splits,
    x_stride, module_stride, slot_stride,
    SPLIT: tl.constexpr, SLOTS: tl.constexpr, STACK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TURNS: tl.constexpr, FACTOR: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # as soon as every program of this launch runs
    row = tl.program_id(0) // TURNS * ROWS + tl.arange(0, ROWS)
    module = tl.program_id(1)
    split = tl.program_id(2)
    known = _ranks_of(ranks, module, num_slots, SLOTS)
    slot = _own_slots(slots, depths, known, row, num_rows, layer_idx, SLOTS)
    slot = _without(slot, tl.program_id(0) % TURNS, TURNS - 1)
    current = tl.max(slot, 0)
    r = tl.arange(0, RANK)
    place = (module * num_splits + split) * num_rows + row
    while current >= 0:
        is_own = slot == current
        rank = _rank_of(known, current, SLOTS)
        weights = lora_A + module.to(tl.int64) * module_stride + current.to(tl.int64) * slot_stride
        # Of these rows alone, as a sum would carry one adapter's infinity into its neighbours' zeros.
        sums = tl.zeros((ROWS, RANK), tl.float32)
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
            sums = tl.dot(inputs.to(FACTOR), transposed.to(FACTOR), sums, input_precision="ieee")
        tl.store(
            low_rank + place[:, None] * STACK + r[None, :],
            sums,
            mask=is_own[:, None] & (r < STACK)[None, :],
        )
        slot = _without(slot, TURNS, TURNS)
        current = tl.max(slot, 0)


@triton.jit(do_not_specialize=["layer_idx", "num_rows"])
def _expand(  # type: ignore[no-untyped-def]
    output, low_rank, lora_B, ranks, scaling, bias, gain, base_bias, slots, depths,
    layer_idx, num_rows, num_slots, output_stride, slot_stride, vector_stride,
    NUM_PARTS: tl.constexpr, TILES: tl.constexpr, MODULES: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr, PLACES: tl.constexpr,
    IS_NEW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BASE_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, SUMMED: tl.constexpr, SLOTS: tl.constexpr, STACK: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr, FACTOR: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    # A tile has columns of one part alone: the last that begins at it or before.
    tile = tl.program_id(1)
    first, module, column, width, place = TILES[0], MODULES[0], COLUMNS[0], WIDTHS[0], PLACES[0]
    for part in tl.static_range(1, NUM_PARTS):
        is_later = tile >= TILES[part]
        first = tl.where(is_later, TILES[part], first)
        module = tl.where(is_later, MODULES[part], module)
        column = tl.where(is_later, COLUMNS[part], column)
        width = tl.where(is_later, WIDTHS[part], width)
        place = tl.where(is_later, PLACES[part], place)
    offset = (tile - first) * BLOCK
    c = tl.arange(0, BLOCK)
    is_column = c < width - offset
    column = column + offset + c
    place = place + offset + c

    row = tl.program_id(0) // TURNS * ROWS + tl.arange(0, ROWS)
    known = _ranks_of(ranks, module, num_slots, SLOTS)
    scaling += module * num_slots
    slot = _own_slots(slots, depths, known, row, num_rows, layer_idx, SLOTS)
    places = output + row[:, None].to(tl.int64) * output_stride + place[None, :]
    is_nobodys = (slot < 0) & (row < num_rows)
    slot = _without(slot, tl.program_id(0) % TURNS, TURNS - 1)
    current = tl.max(slot, 0)
    r = tl.arange(0, RANK)
    while current >= 0:
        is_own = (slot == current)[:, None]
        rank = _rank_of(known, current, SLOTS)
        is_rank = r < rank
        own_scaling = tl.load(scaling + current)
        transposed = tl.load(
            lora_B + current.to(tl.int64) * slot_stride + column[None, :] * STACK + r[:, None],
            mask=is_rank[:, None] & is_column[None, :],
            other=0.0,
        )
        is_changed = is_own & is_column[None, :]
        if IS_EARLY:
            tl.extra.cuda.gdc_wait()  # for what is read from here on; the second time it is over at once
        if IS_NEW:
            y = tl.zeros((ROWS, BLOCK), tl.float32)
        else:
            y = tl.load(places, mask=is_changed, other=0.0).to(tl.float32)
        low = tl.zeros((ROWS, RANK), tl.float32)
        for begin in range(0, SPLITS, SUMMED):
            split = begin + tl.arange(0, SUMMED)[:, None, None]
            own = (module * SPLITS + split) * num_rows + row[None, :, None]
            parts = tl.load(
                low_rank + own * STACK + r[None, None, :],
                mask=(split < SPLITS) & is_own[None, :, :] & is_rank[None, None, :],
                other=0.0,
            )
            low += tl.sum(parts, 0)
        low = low.to(lora_B.dtype.element_ty).to(FACTOR)
        delta = tl.dot(low, transposed.to(FACTOR), input_precision="ieee")
        own_vector = current.to(tl.int64) * vector_stride + column
        if HAS_BIAS:
            delta += tl.load(bias + own_vector, mask=is_column, other=0.0).to(tl.float32)[None, :]
        y += delta * own_scaling
        if HAS_GAIN:
            own_gain = tl.load(gain + own_vector, mask=is_column, other=1.0).to(tl.float32)[None, :]
            if HAS_BASE_BIAS:
                base = tl.load(base_bias + place, mask=is_column, other=0.0).to(tl.float32)[None, :]
                y = base + own_gain * (y - base)
            else:
                y = own_gain * y
        tl.store(places, y.to(output.dtype.element_ty), mask=is_changed)
        slot = _without(slot, TURNS, TURNS)
        current = tl.max(slot, 0)
    if IS_NEW:  # noqa: SIM102 -- the first is decided when the kernel is compiled
        if tl.program_id(0) % TURNS == 0:
            if IS_EARLY:
                tl.extra.cuda.gdc_wait()
            nothing = tl.zeros((ROWS, BLOCK), output.dtype.element_ty)
            tl.store(places, nothing, mask=is_nobodys[:, None] & is_column[None, :])


class TritonKernel:
    """`gathered_kernel.GatheredKernel` by two kernels of its own."""

    name = "triton"

    def shrink(self, x: Tensor, down: DownProjections, rows: Rows, layer_idx: int) -> Tensor:
        """See `GatheredKernel.shrink`. Columns past every adapter's own rank hold zeros."""
        num_modules, num_slots, stack_rank, in_features = down.lora_A.shape
        num_rows = x.shape[0]
        block = tiles.features(stack_rank, x.element_size())
        split, num_splits = tiles.splits(in_features, block)
        low_rank = x.new_empty((num_modules, num_splits, num_rows, stack_rank), dtype=torch.float32)
        turns = tiles.turns(num_rows)
        grid = (triton.cdiv(num_rows, tiles.BLOCK_ROWS) * turns, num_modules, num_splits)
        _shrink[grid](
            x, down.lora_A, down.ranks, rows.slots, rows.depths, low_rank,
            layer_idx, num_rows, in_features, num_slots, num_splits,
            x.stride(0), down.lora_A.stride(0), down.lora_A.stride(1),
            SPLIT=split, SLOTS=tiles.power_of_2_above(num_slots), STACK=stack_rank,
            RANK=tiles.padded(stack_rank), ROWS=tiles.BLOCK_ROWS, BLOCK=block, TURNS=turns,
            FACTOR=_factor(x), IS_EARLY=launches_overlap(x.device),
            num_warps=tiles.SHRINK_WARPS, num_stages=tiles.STAGES,
        )  # fmt: skip
        return low_rank

    def expand(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjections,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        """See `GatheredKernel.expand`."""
        self._launch(output, low_rank, up, rows, layer_idx, base_bias, is_new=False)

    def delta(
        self, low_rank: Tensor, up: UpProjections, rows: Rows, layer_idx: int, out_features: int
    ) -> Tensor:
        """See `GatheredKernel.delta`."""
        shape = (low_rank.shape[2], out_features)
        is_covered = sum(part.width for part in up.parts) == out_features
        delta = up.lora_B.new_empty(shape) if is_covered else up.lora_B.new_zeros(shape)
        self._launch(delta, low_rank, up, rows, layer_idx, None, is_new=True)
        return delta

    def fetch_of(
        self, down: DownProjections, up: UpProjections, rows: Rows, layer_idx: int
    ) -> Callable[[], None] | None:
        """See `GatheredKernel.fetch_of`."""
        return triton_fetch.fetch_of(down, up, rows, layer_idx)

    def _launch(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjections,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
        *,
        is_new: bool,
    ) -> None:
        """is_new: `output` holds nothing yet."""
        num_splits, num_rows, stack_rank = low_rank.shape[1:]
        num_blocks, turns = triton.cdiv(num_rows, tiles.BLOCK_ROWS), tiles.turns(num_rows)
        widths = tuple(part.width for part in up.parts)
        block = tiles.columns(stack_rank, output.element_size(), widths, num_blocks * min(turns, 2))
        ends = list(accumulate(triton.cdiv(width, block) for width in widths))
        vectors = up.bias if up.bias is not None else up.gain
        nothing = up.scaling  # an address that is never read
        is_early = launches_overlap(output.device)
        early = {"IS_EARLY": is_early} | ({"launch_pdl": True} if is_early else {})
        _expand[(num_blocks * turns, ends[-1])](
            output, low_rank, up.lora_B, up.ranks, up.scaling,
            nothing if up.bias is None else up.bias,
            nothing if up.gain is None else up.gain,
            nothing if base_bias is None else base_bias,
            rows.slots, rows.depths,
            layer_idx, num_rows, up.ranks.shape[1], output.stride(0), up.lora_B.stride(0),
            0 if vectors is None else vectors.stride(0),
            NUM_PARTS=len(widths), TILES=(0, *ends[:-1]), WIDTHS=widths,
            MODULES=tuple(part.module for part in up.parts),
            COLUMNS=tuple(part.column for part in up.parts),
            PLACES=tuple(part.place for part in up.parts),
            IS_NEW=is_new,
            HAS_BIAS=up.bias is not None, HAS_GAIN=up.gain is not None,
            HAS_BASE_BIAS=base_bias is not None,
            SPLITS=num_splits, SUMMED=tiles.summed(stack_rank, num_splits),
            SLOTS=tiles.power_of_2_above(up.ranks.shape[1]), STACK=stack_rank,
            RANK=tiles.padded(stack_rank), ROWS=tiles.BLOCK_ROWS, BLOCK=block, TURNS=turns,
            FACTOR=_factor(up.lora_B), num_warps=tiles.warps(stack_rank, block), **early,
        )  # fmt: skip


_FACTORS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _factor(tensor: Tensor) -> tl.dtype:
    """What is multiplied. A CPU is triton's interpreter, which cannot multiply bfloat16: there, wider."""
    return tl.float32 if tensor.device.type == "cpu" else _FACTORS[tensor.dtype]
