"""What a chain writes, as expressions of the place in a vector: the instructions without their registers.

A compiler that cannot take a register apart (Triton) can evaluate an expression anywhere in a vector, so
what an instruction reads from a part of a register is the expression of that part, a few places further on.
Equal expressions are one, and what nobody stores is none.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from server.model.native.structures import Code
from server.model.replay.chain import Chain
from server.model.replay.lowering import Place, Second


@dataclass(frozen=True, slots=True)
class At:
    """Expression `index`, `shift` places further on."""

    index: int
    shift: int


@dataclass(frozen=True, slots=True)
class Load:
    """A vector in memory, which ends after `length` elements."""

    operand: int
    length: int


@dataclass(frozen=True, slots=True)
class Constant:
    """One number everywhere."""

    value: float


@dataclass(frozen=True, slots=True)
class First:
    """The first element of a vector, everywhere."""

    of: At


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a vector's first `length` elements, everywhere."""

    of: At
    length: int


@dataclass(frozen=True, slots=True)
class Apply:
    """An operator, element by element."""

    code: Code
    a: At
    b: At | None


@dataclass(frozen=True, slots=True)
class Part:
    """Of a vector, the `length` elements from `start` on are those of another from its first on."""

    start: int
    length: int
    of: At

    def cut(self, start: int, end: int) -> "Part | None":
        """What of it lies from `start` on and before `end`."""
        first, last = max(start, self.start), min(end, self.start + self.length)
        if first >= last:
            return None
        return Part(first, last - first, At(self.of.index, self.of.shift + first - self.start))


@dataclass(frozen=True, slots=True)
class Join:
    """Vectors one behind the other, the first from 0 on."""

    parts: tuple[Part, ...]


Expression = Load | Constant | First | Mean | Apply | Join


@dataclass(frozen=True, slots=True)
class Stored:
    """The first `length` elements of a vector, written to memory."""

    operand: int
    of: At
    length: int


class Expressions:
    """Those of one chain."""

    def __init__(self, chain: Chain) -> None:
        self.nodes: list[Expression] = []
        """An expression comes after those that it is made of."""
        self.stored: list[Stored] = []
        self._known: dict[Hashable, int] = {}
        self._registers: list[list[Part]] = [[] for _ in chain.registers]
        for instruction in chain.instructions:
            out, a, operand = instruction.out, instruction.a, instruction.operand
            if instruction.code is Code.LOAD:
                assert out is not None
                assert operand is not None
                self._write(out, self._new(Load(operand, out.length)))
                continue
            assert a is not None
            if instruction.code is Code.STORE:
                assert operand is not None
                is_rounded = chain.operands[operand].value.dtype is torch.bfloat16
                self.stored.append(Stored(operand, self._stored(a, is_rounded), a.length))
                continue
            assert out is not None
            self._write(out, self._value(instruction.code, out, a, instruction.b))

    @property
    def width(self) -> int:
        """The longest vector that is written, or of which there is a mean."""
        means = [node.length for node in self.nodes if isinstance(node, Mean)]
        return max([*means, *(stored.length for stored in self.stored)])

    @property
    def has_mean(self) -> bool:
        """Whether a part of a vector depends on all of it."""
        return any(isinstance(node, Mean) for node in self.nodes)

    def _value(self, code: Code, out: Place, a: Place, b: Second) -> At:
        first = self._read(a)
        if code is Code.COPY:
            return first
        if code is Code.MEAN:
            return self._new(Mean(first, a.length))
        second = None
        if isinstance(b, Place):
            second = self._read(b)
            if b.length != out.length:
                second = self._new(First(second))
        elif b is not None:
            second = self._new(Constant(b))
        return self._new(Apply(code, first, second))

    def _stored(self, place: Place, is_rounded: bool) -> At:
        value = self._read(place)
        node = self.nodes[value.index]
        if not is_rounded or (isinstance(node, Apply) and node.code is Code.ROUND):
            return value
        return self._new(Apply(Code.ROUND, value, None))

    def _new(self, node: Expression) -> At:
        # repr tells -0.0 from 0.0, which equal each other.
        key = (Constant, repr(node.value)) if isinstance(node, Constant) else node
        index = self._known.setdefault(key, len(self.nodes))
        if index == len(self.nodes):
            self.nodes.append(node)
        return At(index, 0)

    def _write(self, place: Place, value: At) -> None:
        end = place.start + place.length
        rest = [
            part
            for old in self._registers[place.register]
            for part in (old.cut(0, place.start), old.cut(end, old.start + old.length))
            if part is not None
        ]
        rest.append(Part(place.start, place.length, value))
        self._registers[place.register] = sorted(rest, key=lambda part: part.start)

    def _read(self, place: Place) -> At:
        end = place.start + place.length
        cuts = (old.cut(place.start, end) for old in self._registers[place.register])
        parts = [part for part in cuts if part is not None]
        assert sum(part.length for part in parts) == place.length  # all of it has been written
        if len(parts) == 1:
            return parts[0].of
        moved = (Part(part.start - place.start, part.length, part.of) for part in parts)
        return self._new(Join(tuple(moved)))
