"""What a launch asks for ahead of a product: exactly the weights that some row will read, once each.

Asking is an instruction that only a GPU has; which addresses it is given is computed by Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor, nn

from server.model.gathered_kernel import DownProjections, Rows, UpProjections
from server.model.lora import LoraWeights
from server.model.stacks import SharedInput
from server.model.targets import Target

triton = pytest.importorskip(
    "triton",
    reason="no triton, which the dev extra installs on Linux x86-64: its kernels are not tested",
)
import triton.language as tl  # noqa: E402

from server.model import triton_fetch  # noqa: E402
from server.model.triton_lora import TritonKernel  # noqa: E402

NUM_SLOTS, IN, OUT = 4, 3000, (520, 136)
PLENTY = 1 << 40


@triton.jit
def _told(
    addresses, lengths, num_parts, lora_A, lora_B, ranks, slots, depths,
    layer_idx, num_rows, num_slots, most_adapters, module_stride, slot_stride, up_stride,
    ROW_BYTES: tl.constexpr, UP_BYTES: tl.constexpr, NUM_MODULES: tl.constexpr, PARTS: tl.constexpr,
    STACK: tl.constexpr, MODULES: tl.constexpr, ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As `_fetch`, but what it would ask for is stored."""
    address, length = triton_fetch._chunks(
        tl.program_id(0), tl.program_id(1), lora_A, lora_B, ranks, slots, depths,
        layer_idx, num_rows, num_slots, most_adapters, module_stride, slot_stride, up_stride,
        ROW_BYTES, UP_BYTES, NUM_MODULES, PARTS, STACK, MODULES, ROWS, NUM_CHUNKS, CHUNK,
    )  # fmt: skip
    place = (tl.program_id(0) * num_parts + tl.program_id(1)) * NUM_CHUNKS + tl.arange(
        0, NUM_CHUNKS
    )
    tl.store(addresses + place, address)
    tl.store(lengths + place, length)


def asked_for(
    down: DownProjections, up: UpProjections, rows: Rows, layer_idx: int, most_bytes: int = PLENTY
) -> list[tuple[int, int]]:
    """First and last address of each stretch without a gap, in order; none is asked for twice."""
    launch = triton_fetch.plan(down, up, rows, layer_idx, most_bytes)
    assert launch is not None
    num_chunks = launch.grid[0] * launch.grid[1] * launch.constants["NUM_CHUNKS"]
    addresses = torch.zeros(num_chunks, dtype=torch.int64)
    lengths = torch.zeros(num_chunks, dtype=torch.int32)
    _told[launch.grid](addresses, lengths, launch.grid[1], *launch.arguments, **launch.constants)
    chunks = [chunk for chunk in zip(addresses.tolist(), lengths.tolist(), strict=True) if chunk[1]]
    for start, length in chunks:
        assert start % 16 == 0
        assert length % 16 == 0
    return joined(chunks)


def joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of starts and lengths, neighbours as one; none may lie in another."""
    found: list[tuple[int, int]] = []
    for start, length in sorted(parts):
        assert not found or start >= found[-1][1]
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], start + length)
        else:
            found.append((start, start + length))
    return found


def stretches(*tensors: Tensor) -> list[tuple[int, int]]:
    """Those of contiguous tensors, neighbours joined."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    return joined([(tensor.data_ptr(), tensor.nbytes) for tensor in tensors])


def group_of(ranks: dict[tuple[int, int], int], in_features: int = IN) -> SharedInput:
    """ranks: by module and slot."""
    linears = [nn.Linear(in_features, out_features) for out_features in OUT]
    targets = [Target(module, 0, "linear", in_features, module.out_features) for module in linears]
    group = SharedInput(targets, NUM_SLOTS, torch.empty(0, dtype=torch.bfloat16))
    for (module, slot), rank in ranks.items():
        weights = (torch.zeros(rank, in_features), torch.zeros(OUT[module], rank))
        group.put(module, slot, LoraWeights(*weights, scaling=1.0))
    return group


def rows(*pairs: tuple[int, int]) -> Rows:
    """Of each row slot and depth."""
    slots, depths = torch.tensor(pairs, dtype=torch.int32).T
    return Rows(slots.contiguous(), depths.contiguous())


ALL = {(module, slot): 16 for module in range(2) for slot in range(NUM_SLOTS)}


def test_those_of_every_adapter_that_some_row_applies() -> None:
    group = group_of(ALL)
    where = rows((-1, 0), (0, 1), (2, 5), (2, 1), (3, 0), (3, 1))  # of layer 1 slot 2 alone
    A, B = group.down.lora_A, group.up.lora_B
    assert asked_for(group.down, group.up, where, 1) == stretches(A[0, 2], A[1, 2], B[2])
    both = stretches(A[0, 0], A[0, 2], A[0, 3], A[1, 0], A[1, 2], A[1, 3], B[0], B[2], B[3])
    assert asked_for(group.down, group.up, where, 0) == both
    assert asked_for(group.down, group.up, where, 5) == []


def test_each_modules_own_rank_and_no_module_it_does_not_target() -> None:
    group = group_of({(0, 0): 12, (1, 1): 16, (0, 2): 4})
    A, B = group.down.lora_A, group.up.lora_B
    assert asked_for(group.down, group.up, rows((0, 1)), 0) == stretches(A[0, 0, :12], B[0])
    assert asked_for(group.down, group.up, rows((1, 1)), 0) == stretches(A[1, 1], B[1])
    # A quarter of the stack's rank: its columns of `lora_B` lie scattered.
    assert asked_for(group.down, group.up, rows((2, 1)), 0) == stretches(A[0, 2, :4])


def test_no_more_adapters_than_there_is_room_for() -> None:
    group = group_of(ALL)
    A, B = group.down.lora_A, group.up.lora_B
    where = rows(*[(slot, 1) for slot in (1, 1, 2, 3, 3)])
    one = A[:, 0].nbytes + B[0].nbytes
    two = stretches(A[0, 1], A[0, 2], A[1, 1], A[1, 2], B[1], B[2])
    assert asked_for(group.down, group.up, where, 0, 2 * one) == two
    assert asked_for(group.down, group.up, where, 0, 3 * one - 1) == two
    assert triton_fetch.plan(group.down, group.up, where, 0, one - 1) is None


def test_a_view_of_one_modules_columns() -> None:
    group = group_of(ALL)
    up = group.up.alone(group.up.parts[1])
    found = asked_for(group.down, up, rows((3, 1)), 0)
    assert found == stretches(group.down.lora_A[0, 3], group.down.lora_A[1, 3], up.lora_B[3])


def test_rows_that_cannot_be_fetched_in_bulk_are_not() -> None:
    group = group_of(ALL, in_features=3001)
    assert triton_fetch.plan(group.down, group.up, rows((0, 1)), 0, PLENTY) is None


def test_a_cpu_fetches_nothing() -> None:
    group = group_of(ALL)
    assert TritonKernel().fetch_of(group.down, group.up, rows((0, 1)), 0) is None
