"""Adapters' weights for one module side by side, so that many small products become one.

Rows of few tokens each, as decode steps have, spend their time on calls: 16 rows of 16 adapters of
rank 16 through a module of 768 x 768 took 122 us in products of their own and 36 to 50 us in two
batched ones (torch 2.13, one core of an AMD EPYC, Zen 4). So plain LoRA of one rank lies in tensors of
`STACK_SIZE` slots, and neighbouring slots of one tensor are multiplied as a batch.

Knows no request and no depth: `lora` says which rows. Only on a CPU, where memory that no adapter has
touched costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STACK_SIZE = 8
"""Small, as a stack is made whole for its first adapter."""
MAX_ROWS = 16
"""A segment of more rows fills a product of its own."""
MAX_PADDING = 2.0
"""Rows of a batch, which are as many for each adapter, over the rows there are."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows with the same adapter."""

    slot: int
    start: int
    end: int


class LoraStack:
    """One module's plain LoRA of one rank. A place that nobody filled holds anything."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """lora_A `[rank, in_features]` and lora_B `[out_features, rank]`: shaped as those to come."""
        self.lora_A = lora_A.new_empty(STACK_SIZE, *lora_A.shape)
        """`[STACK_SIZE, rank, in_features]`"""
        self.lora_B = lora_B.new_empty(STACK_SIZE, *lora_B.t().shape)
        """`[STACK_SIZE, rank, out_features]`"""

    def put(self, slot: int, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Copy an adapter's weights in; returns them as they lie here, in the same shapes."""
        place = slot % STACK_SIZE
        self.lora_A[place].copy_(lora_A)
        self.lora_B[place].copy_(lora_B.t())
        return self.lora_A[place], self.lora_B[place].t()


StackKey = tuple[int, int]
"""The rank, and which of a module's stacks of that rank."""


def stack_key(slot: int, rank: int) -> StackKey:
    """The stack in which a slot lies."""
    return rank, slot // STACK_SIZE


@dataclass(frozen=True, slots=True)
class Stacked:
    """Which slots lie in a module's stacks: where and with which scaling. One object for equal modules."""

    slots: Mapping[int, tuple[StackKey, float]]


@dataclass(frozen=True, slots=True)
class Padding:
    """Between the rows of a step and those of a batch, which are as many for each slot. All int64.

    rows: `[num_rows]`, where each row lies in the step. padded: `[num_slots * width]`, the row of the
    step that each row of the batch reads. unpadded: `[num_rows]`, the batch's row for each.
    """

    rows: Tensor
    padded: Tensor
    unpadded: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring places of one stack, and their rows.

    padding: None where the rows are `start` to `end` and every slot has `width` of them.
    scales: `[num_slots, 1, 1]` where slots differ in `scaling`, which then is 1.
    """

    stack: StackKey
    first: int
    end_place: int
    width: int
    start: int
    end: int
    padding: Padding | None
    scaling: float
    scales: Tensor | None


class ReachedRows(list[Segment]):
    """The segments of a layer, and how they batch: worked out once for modules that hold the same."""

    def __init__(self, segments: Sequence[Segment] = ()) -> None:
        super().__init__(segments)
        self._batches: dict[int, tuple[list[Batch], list[Segment]]] = {}

    def batches(self, stacked: Stacked) -> tuple[list[Batch], list[Segment]]:
        """Batches, and the segments that are in none. `stacked` must outlive this object."""
        found = self._batches.get(id(stacked))
        if found is None:
            found = self._batches[id(stacked)] = _plan(self, stacked)
        return found


def apply_batch(output: Tensor, x: Tensor, batch: Batch, stack: LoraStack) -> None:
    """Add `scaling * B (A x)` to the batch's rows of `output`, in place.

    output `[num_rows, out_features]`, x `[num_rows, in_features]`: of the whole step.
    """
    places = slice(batch.first, batch.end_place)
    lora_A, lora_B = stack.lora_A[places].transpose(1, 2), stack.lora_B[places]
    shape = (lora_B.shape[0], batch.width, -1)
    own, padding = slice(batch.start, batch.end), batch.padding
    read = x[own] if padding is None else x.index_select(0, padding.padded)
    low_rank = torch.bmm(read.view(shape), lora_A)
    if batch.scales is not None:
        low_rank *= batch.scales
    if padding is None:
        output[own].view(shape).baddbmm_(low_rank, lora_B, alpha=batch.scaling)
    else:
        delta = torch.bmm(low_rank, lora_B).flatten(0, 1).index_select(0, padding.unpadded)
        output.index_add_(0, padding.rows, delta, alpha=batch.scaling)


def _plan(segments: Sequence[Segment], stacked: Stacked) -> tuple[list[Batch], list[Segment]]:
    batches: list[Batch] = []
    alone: list[Segment] = []
    run: list[Segment] = []

    def end_run() -> None:
        width = max((segment.end - segment.start for segment in run), default=0)
        num_rows = sum(segment.end - segment.start for segment in run)
        if len(run) > 1 and len(run) * width <= MAX_PADDING * num_rows:
            batches.append(_batch(run, width, stacked))
        else:
            alone.extend(run)
        run.clear()

    for segment in segments:
        found = stacked.slots.get(segment.slot)
        if found is None or segment.end - segment.start > MAX_ROWS:
            alone.append(segment)
            continue
        if run and (segment.slot != run[-1].slot + 1 or found[0] != stacked.slots[run[-1].slot][0]):
            end_run()
        run.append(segment)
    end_run()
    return batches, alone


def _batch(run: Sequence[Segment], width: int, stacked: Stacked) -> Batch:
    rows: list[int] = []
    padded: list[int] = []
    unpadded: list[int] = []
    for index, segment in enumerate(run):
        own = range(segment.start, segment.end)
        rows.extend(own)
        # What is read beyond a slot's rows is dropped; its last row again is always there to read.
        padded.extend([*own, *([segment.end - 1] * (width - len(own)))])
        unpadded.extend(range(index * width, index * width + len(own)))
    start, end = run[0].start, run[-1].end
    is_even = len(rows) == len(padded) == end - start
    scalings = [stacked.slots[segment.slot][1] for segment in run]
    is_one_scaling = len(set(scalings)) == 1
    return Batch(
        stack=stacked.slots[run[0].slot][0],
        first=run[0].slot % STACK_SIZE,
        end_place=run[-1].slot % STACK_SIZE + 1,
        width=width,
        start=start,
        end=end,
        padding=None if is_even else Padding(*map(torch.tensor, (rows, padded, unpadded))),
        scaling=scalings[0] if is_one_scaling else 1.0,
        scales=None if is_one_scaling else torch.tensor(scalings).view(-1, 1, 1),
    )
