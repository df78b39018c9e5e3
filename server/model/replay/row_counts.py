"""Which numbers in a program's calls are numbers of rows, so that it can be run with fewer.

A pass is noted twice, for n rows and for n + 1. Where all that differs is one dimension of some values, n
long in one and n + 1 in the other, operators work on whole vectors beside that dimension, and row r of
whatever is made comes from row r of what is read. Then kernels that are told of fewer rows do the same for
the first of them, in memory that stays laid out for n. For more than n, see `prompt_rows`.
"""

from collections.abc import Iterator, Sequence
from ctypes import Array, Structure, c_void_p
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

from server.model.native.structures import ROW_COUNTS
from server.model.replay.bound import Bound
from server.model.replay.tape import Call, Tape, Value
from server.model.replay.trees import leaves


class NotByRows(Exception):
    """Why a pass can only be run with the number of rows that it was noted with."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A number in a structure: a field, or an element of one that is an array."""

    structure: Structure
    name: str
    index: int | None

    def set(self, number: int) -> None:
        if self.index is None:
            setattr(self.structure, self.name, number)
        else:
            getattr(self.structure, self.name)[self.index] = number


Counts = list[tuple[_Field, int]]
"""Of one step: each with how many of it a row has."""


class RowCounts:
    """Those of one program."""

    def __init__(self, counts: Sequence[Counts], num_rows: int, behind: int | None = None) -> None:
        """counts: of each step. num_rows: that they say now. behind: the first step that only has the wanted
        rows of those before; None where all have all.
        """
        split = len(counts) if behind is None else behind
        self._parts = [list(chain.from_iterable(part)) for part in (counts[:split], counts[split:])]
        self._now = [num_rows, num_rows]

    def set(self, num_rows: int, num_wanted: int | None = None) -> None:
        """From now on run with so many rows, for which there must be memory; without the second number each
        is wanted.
        """
        wanted = [num_rows, num_rows if num_wanted is None else num_wanted]
        for index, number in enumerate(wanted):
            if number != self._now[index]:
                for field, per_row in self._parts[index]:
                    field.set(per_row * number)
        self._now = wanted


def row_counts(
    tapes: tuple[Tape, Tape],
    steps: tuple[Sequence[Call | Bound], Sequence[Call | Bound]],
    num_rows: int,
) -> list[Counts]:
    """Of the steps of the first of two programs: what was noted with `num_rows` rows and with one more, and
    what became of it. Raises NotByRows.
    """
    _compare_tapes(*tapes, num_rows)
    counts: list[Counts] = []
    if len(steps[0]) != len(steps[1]):
        raise NotByRows("more rows are other steps")
    for step, other in zip(*steps, strict=True):
        if not isinstance(step, Bound) or not isinstance(other, Bound):
            raise NotByRows("not all of its steps are kernels'")
        if step.kernel != other.kernel or len(step.parts) != len(other.parts):
            raise NotByRows("more rows are other steps")
        for value, larger in zip(step.operands, other.operands, strict=True):
            axis = row_axis(value, larger, num_rows)
            if axis and step.counts_flat_rows and prod(value.size[:axis]) != 1:
                raise NotByRows("rows do not lie one after the other")
        pairs = zip(step.parts, other.parts, strict=True)
        counts.append([count for part, more in pairs for count in _counts(part, more, num_rows)])
    return counts


def _compare_tapes(tape: Tape, other: Tape, num_rows: int) -> None:
    if len(tape.calls) != len(other.calls):
        raise NotByRows("more rows are other operators")
    for call, larger in zip(tape.calls, other.calls, strict=True):
        given = list(leaves((call.args, call.kwargs, call.outputs)))
        given_larger = list(leaves((larger.args, larger.kwargs, larger.outputs)))
        if call.function != larger.function or len(given) != len(given_larger):
            raise NotByRows("more rows are other operators")
        for leaf, larger_leaf in zip(given, given_larger, strict=True):
            if isinstance(leaf, Value) and isinstance(larger_leaf, Value):
                row_axis(leaf, larger_leaf, num_rows)
            elif leaf != larger_leaf:
                raise NotByRows("an operator is told the number of rows")
    there = {root: tensor.data_ptr() for root, tensor in tape.given.items()}
    if there != {root: tensor.data_ptr() for root, tensor in other.given.items()}:
        raise NotByRows("it finds other tensors in each pass")


def row_axis(value: Value, larger: Value, num_rows: int) -> int | None:
    """The dimension that rows are counted in, None where there is none."""
    pairs = enumerate(zip(value.size, larger.size, strict=False))
    sizes = [(axis, size, more) for axis, (size, more) in pairs if size != more]
    is_same = (value.root, value.dtype, value.offset) == (larger.root, larger.dtype, larger.offset)
    if not is_same or len(value.size) != len(larger.size):
        raise NotByRows("more rows are other values")
    if [numbers for _, *numbers in sizes] not in ([], [[num_rows, num_rows + 1]]):
        raise NotByRows("rows are not one dimension of a value")
    return sizes[0][0] if sizes else None


def _counts(part: Structure, larger: Structure, num_rows: int) -> Iterator[tuple[_Field, int]]:
    for (field, number), (_, more) in zip(_numbers(part), _numbers(larger), strict=True):
        if number == more or field.name.endswith(("_stride", "strides")):
            continue  # it stays as far apart
        per_row = number // num_rows
        is_count = field.name in ROW_COUNTS.get(type(field.structure), ())
        if not is_count or (number, more) != (per_row * num_rows, per_row * (num_rows + 1)):
            raise NotByRows(f"{field.name} is another number for more rows")
        yield field, per_row


def _numbers(structure: Structure) -> Iterator[tuple[_Field, Any]]:
    """All but addresses."""
    for name, kind, *_ in structure._fields_:
        content = getattr(structure, name)
        if isinstance(content, Structure):
            yield from _numbers(content)
        elif isinstance(content, Array):
            for index, number in enumerate(content):
                yield _Field(structure, name, index), number
        elif kind is not c_void_p:
            yield _Field(structure, name, None), content
