"""What lets a program that was noted for decode rows run prompts, too.

Attention is told what each row is (`pass.h`), all else does the same for every row, so a prompt is only
more rows than were noted. Where rows lie one after the other in whatever is made, more of them follow where
the noted ones end. Of a prompt's rows few are read once attention has mixed them for the last time, and only
those are computed from there on: they move to the front of what is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from server.model.native.structures import KeepCall
from server.model.replay.bound import Bound
from server.model.replay.row_counts import row_axis
from server.model.replay.tape import Call, Value

ATTENTION = "fathom_attention_layer"


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Of one program by rows."""

    max_rows: int
    behind: int
    """The first of its steps behind the last attention."""
    keeps: list[Bound]
    """What belongs before that."""
    room: dict[int, int]
    """By root, bytes that all rows take of what the steps before that make, over those of the noted ones."""

    def among(self, steps: Sequence[Call | Bound]) -> list[Call | Bound]:
        """The program's steps, with what keeps the wanted rows."""
        return [*steps[: self.behind], *self.keeps, *steps[self.behind :]]


def prompt_rows(
    steps: tuple[Sequence[Call | Bound], Sequence[Call | Bound]],
    given: Mapping[int, Tensor],
    results: Sequence[Value],
    num_rows: int,
    max_rows: int,
) -> PromptRows | None:
    """Of the first of two programs, which `row_counts` approved; None where it can only run decode rows.

    given: as of its tape. results: what is read of it in the end. max_rows: of a step.
    """
    own, larger = ([step for step in one if isinstance(step, Bound)] for one in steps)
    behind = 1 + max((i for i, step in enumerate(own) if step.kernel == ATTENTION), default=-1)
    made: dict[int, tuple[Value, int]] = {}
    for index, (step, other) in enumerate(zip(own, larger, strict=True)):
        for value, more in zip(step.operands, other.operands, strict=True):
            axis = row_axis(value, more, num_rows)
            if axis is None:
                continue
            if index < behind and value in step.stores:
                made[value.root] = value, axis
            tensor = given.get(value.root)
            if tensor is not None and (
                index >= behind or not _reaches(tensor, value, axis, max_rows)
            ):
                return None
            if index < behind and not _goes_on(value, more):
                return None
    read_behind = {value.root for step in own[behind:] for value in step.operands}
    read_behind.update(value.root for value in results)
    kept = [made[root] for root in made if root in read_behind]
    if not behind or any(_row_size(*one) > one[0].stride[one[1]] for one in kept):
        return None
    return PromptRows(
        max_rows,
        behind,
        [_keep(value, axis) for value, axis in kept],
        {
            root: max(0, max_rows - num_rows) * value.stride[axis] * value.dtype.itemsize
            for root, (value, axis) in made.items()
        },
    )


def _goes_on(value: Value, larger: Value) -> bool:
    """Whether a row more leaves those before it where they are."""
    strides = zip(value.size, value.stride, larger.stride, strict=True)
    return all(stride == other for size, stride, other in strides if size != 1)


def _reaches(tensor: Tensor, value: Value, axis: int, max_rows: int) -> bool:
    """Whether what a pass found has so many rows."""
    end = value.offset + value.extent + (max_rows - value.size[axis]) * value.stride[axis]
    return end * value.dtype.itemsize <= tensor.untyped_storage().nbytes()


def _row_size(value: Value, axis: int) -> int:
    """Elements from a row's first to its last, with both."""
    return value.extent - (value.size[axis] - 1) * value.stride[axis]


def _keep(value: Value, axis: int) -> Bound:
    item = value.dtype.itemsize
    call = KeepCall(row_stride=value.stride[axis] * item, row_bytes=_row_size(value, axis) * item)
    return Bound("fathom_keep_rows", call, (value,), ((call, "rows"),), ())
