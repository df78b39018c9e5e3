"""LoRA weights asked for before they are read, in Triton, for CUDA devices. Importing this needs triton.

A base product keeps a GPU's memory busy from its first moment to its last: what LoRA loads beside it waits
in the same queue, microseconds each time. But between two products, while elementwise kernels run, that
memory idles. Which weights a step will read is known when it begins, so one small launch asks for those of
the next product's adapters then and ends without waiting: they come into the cache that all processors share,
and stay there until they are read, as lines that are to be evicted last (`cp.async.bulk.prefetch` with an
`evict_last` policy, PTX ISA 8.0).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from server.model.gathered_kernel import DownProjections, Rows, UpProjections
from server.model.lora_tiles import power_of_2_above

_NUM_CHUNKS = 32
"""Of one program: one a thread."""
_CHUNK = 4096
"""Bytes that one thread asks for."""
_ALIGNMENT = 16
"""Of an address and a size, in bytes."""
_CACHE_PART = 4
"""Of the shared cache a quarter, for outputs and the key-value cache pass through it, too."""


@cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a launch can begin before the last one on its stream has ended, and weights be fetched in bulk.

    Compute capability 9.0 and newer. An interpreter has neither.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and hasattr(tl.extra.cuda, "gdc_wait")
    )


@triton.jit
def _chunks(  # type: ignore[no-untyped-def]
    current, part, lora_A, lora_B, ranks, slots, depths,
    layer_idx, num_rows, num_slots, most_adapters, module_stride, slot_stride, up_stride,
    ROW_BYTES: tl.constexpr, UP_BYTES: tl.constexpr, NUM_MODULES: tl.constexpr, PARTS: tl.constexpr,
    STACK: tl.constexpr, MODULES: tl.constexpr, ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Address and bytes of what one program asks for; no bytes where nobody needs them."""
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    is_follower = is_row & (row > 0)
    slot = tl.load(slots + row, mask=is_row, other=-1)
    depth = tl.load(depths + row, mask=is_row, other=0)
    slot_before = tl.load(slots + row - 1, mask=is_follower, other=-1)
    depth_before = tl.load(depths + row - 1, mask=is_follower, other=0)
    applies = (slot >= 0) & (depth > layer_idx)
    # Rows are sorted by adapter; where they are not, one counts more than once, and less is fetched.
    is_first = applies & ((slot_before != slot) | (depth_before <= layer_idx))
    num_before = tl.sum((is_first & (slot < current)).to(tl.int32), 0)
    num_own = tl.sum((applies & (slot == current)).to(tl.int32), 0)
    module = tl.arange(0, MODULES)
    rank = tl.load(ranks + module * num_slots + current, mask=module < NUM_MODULES, other=0)
    if part < NUM_MODULES * PARTS:
        own = part // PARTS
        start = lora_A + own.to(tl.int64) * module_stride + current.to(tl.int64) * slot_stride
        size = tl.sum(tl.where(module == own, rank, 0), 0) * ROW_BYTES
        first = part % PARTS * (NUM_CHUNKS * CHUNK)
    else:
        start = lora_B + current.to(tl.int64) * up_stride
        # Of a stack that is far wider than this adapter, most would be fetched for nothing.
        size = tl.where(tl.max(rank, 0) * 2 >= STACK, UP_BYTES, 0)
        first = (part - NUM_MODULES * PARTS) * (NUM_CHUNKS * CHUNK)
    size = tl.where((num_own > 0) & (num_before < most_adapters), size, 0)
    offset = first + tl.arange(0, NUM_CHUNKS) * CHUNK
    return start.to(tl.int64, bitcast=True) + offset, tl.minimum(
        tl.maximum(size - offset, 0), CHUNK
    )


@triton.jit(do_not_specialize=["layer_idx", "num_rows"])
def _fetch(  # type: ignore[no-untyped-def]
    lora_A, lora_B, ranks, slots, depths,
    layer_idx, num_rows, num_slots, most_adapters, module_stride, slot_stride, up_stride,
    ROW_BYTES: tl.constexpr, UP_BYTES: tl.constexpr, NUM_MODULES: tl.constexpr, PARTS: tl.constexpr,
    STACK: tl.constexpr, MODULES: tl.constexpr, ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    address, length = _chunks(
        tl.program_id(0), tl.program_id(1), lora_A, lora_B, ranks, slots, depths,
        layer_idx, num_rows, num_slots, most_adapters, module_stride, slot_stride, up_stride,
        ROW_BYTES, UP_BYTES, NUM_MODULES, PARTS, STACK, MODULES, ROWS, NUM_CHUNKS, CHUNK,
    )  # fmt: skip
    tl.inline_asm_elementwise(
        """{
        .reg .pred is_any;
        .reg .b64 policy;
        createpolicy.fractional.L2::evict_last.b64 policy, 1.0;
        setp.ne.b32 is_any, $2, 0;
        @is_any cp.async.bulk.prefetch.L2.global.L2::cache_hint [$1], $2, policy;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [address, length],
        dtype=tl.int32,  # nothing comes back, but something must
        is_pure=False,
        pack=1,
    )


@dataclass(frozen=True, slots=True)
class Fetch:
    """One launch."""

    grid: tuple[int, int]
    """Slots, and parts of one slot's weights."""
    arguments: tuple[object, ...]
    constants: dict[str, int]

    def __call__(self) -> None:
        """Launch it: nothing is changed, nothing is waited for."""
        _fetch[self.grid](*self.arguments, **self.constants, num_warps=1)


def fetch_of(down: DownProjections, up: UpProjections, rows: Rows, layer_idx: int) -> Fetch | None:
    """See `GatheredKernel.fetch_of`. No more than the cache has room for."""
    device = down.lora_A.device
    if not launches_overlap(device):
        return None
    cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return plan(down, up, rows, layer_idx, cache_bytes // _CACHE_PART)


def plan(
    down: DownProjections, up: UpProjections, rows: Rows, layer_idx: int, most_bytes: int
) -> Fetch | None:
    """Of the adapters of a step as many as have room in `most_bytes`, those of the lowest slots.

    None if that is not one, or if weights are not aligned as the instruction wants it.
    """
    num_modules, num_slots, stack_rank, in_features = down.lora_A.shape
    element_size = down.lora_A.element_size()
    row_bytes = in_features * element_size
    up_bytes = up.lora_B.shape[1] * stack_rank * element_size
    most_adapters = most_bytes // (num_modules * stack_rank * row_bytes + up_bytes)
    if row_bytes % _ALIGNMENT or stack_rank * element_size % _ALIGNMENT or not most_adapters:
        return None
    of_program = _NUM_CHUNKS * _CHUNK
    parts = triton.cdiv(stack_rank * row_bytes, of_program)
    return Fetch(
        (num_slots, num_modules * parts + triton.cdiv(up_bytes, of_program)),
        (
            down.lora_A, up.lora_B, down.ranks, rows.slots, rows.depths,
            layer_idx, len(rows.slots), num_slots, most_adapters,
            down.lora_A.stride(0), down.lora_A.stride(1), up.lora_B.stride(0),
        ),
        {
            "ROW_BYTES": row_bytes, "UP_BYTES": up_bytes, "NUM_MODULES": num_modules, "PARTS": parts,
            "STACK": stack_rank, "MODULES": power_of_2_above(num_modules),
            "ROWS": power_of_2_above(len(rows.slots)), "NUM_CHUNKS": _NUM_CHUNKS, "CHUNK": _CHUNK,
        },
    )  # fmt: skip
