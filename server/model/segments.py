"""Neighbouring rows of a step that apply the same adapter: what every LoRA kernel is given."""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start` to `end` apply the adapter in `slot`."""

    slot: int
    start: int
    end: int


class ReachedRows(tuple[Segment, ...]):
    """The segments of one layer, in the order of their rows."""

    @cached_property
    def packed(self) -> "array[int]":
        """int64 `slot, start, end` of each, for compiled code."""
        return array("q", [n for s in self for n in (s.slot, s.start, s.end)])

    @cached_property
    def location(self) -> tuple[int, int]:
        """Address of `packed`, and how many segments there are."""
        address, _ = self.packed.buffer_info()
        return address, len(self)

    def among(self, rows: Sequence[int]) -> "ReachedRows":
        """The segments where only these rows are left, which rise; row `i` is then the `i`-th of them."""
        left = (Segment(s.slot, bisect_left(rows, s.start), bisect_left(rows, s.end)) for s in self)
        return ReachedRows(segment for segment in left if segment.start < segment.end)
