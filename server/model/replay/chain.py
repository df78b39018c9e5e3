"""Neighbouring elementwise calls of a tape as chains: one pass over memory in place of one a call.

Calls whose results have the same outer dimensions (all but the last) can share a chain: each then is a step
in the life of one vector. A chain's intermediate results stay in registers unless somebody else reads them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from server.model.native.structures import Code
from server.model.replay.lowering import Lower, Place, Second, lowering
from server.model.replay.tape import Call, Value

MAX_OUTER = 4
"""Outer dimensions of more than one element, as `chain.c` has them."""
_MAX_CALLS = 24  # and `chain.c` has room for the four operands that each has at most
"""Of a chain, so that its registers stay in the nearest cache."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Memory that a chain reads or writes, a vector at a time."""

    value: Value
    strides: tuple[int, ...]
    """Of the outer dimensions that have more than one element, in elements; 0 repeats."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operator on registers; of LOAD and STORE `operand` says which memory."""

    code: Code
    out: Place | None
    a: Place | None
    b: Second = None
    operand: int | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """What is left of some calls."""

    outer: tuple[int, ...]
    operands: tuple[Operand, ...]
    instructions: tuple[Instruction, ...]
    registers: tuple[int, ...]
    """Each one's floats."""
    stores: tuple[Value, ...]

    @property
    def num_computed(self) -> int:
        """Floats of one vector that its instructions compute."""
        return sum(i.out.length for i in self.instructions if i.out is not None)

    @property
    def inputs(self) -> list[Value]:
        """Every value that is read from memory."""
        stored = {value.root for value in self.stores}
        return [o.value for o in self.operands if o.value.root not in stored]


@dataclass
class _Group:
    outer: tuple[int, ...]
    calls: list[tuple[Call, Lower]] = field(default_factory=list)
    made: dict[int, Value] = field(default_factory=dict)
    """By root, what its calls make."""


def fused(calls: Sequence[Call], results: Sequence[Value]) -> list[Call | Chain]:
    """The same work with chains where they can be. results: what is read when all is done."""
    readers: dict[int, list[Call]] = {}
    for call in calls:
        for value in call.inputs:
            readers.setdefault(value.root, []).append(call)
    kept = {value.root for value in results}
    steps: list[Call | Chain] = []
    for run in _runs(calls):
        if isinstance(run, Call):
            steps.append(run)
            continue
        for group in _groups(run):
            own = {id(call) for call, _ in group.calls}
            wanted = {
                root
                for root in group.made
                if root in kept or any(id(call) not in own for call in readers.get(root, ()))
            }
            steps.append(_Writer(group, wanted).chain())
    return steps


def _runs(calls: Sequence[Call]) -> Iterator[Call | list[tuple[Call, Lower]]]:
    """Calls that stay as they are, and between them those that can be in chains."""
    run: list[tuple[Call, Lower]] = []
    for call in calls:
        lower = lowering(call)
        if lower is not None and _fits(call):
            run.append((call, lower))
            continue
        if run:
            yield run
            run = []
        yield call
    if run:
        yield run


def _fits(call: Call) -> bool:
    """Whether every vector lies in one piece, and there are not too many outer dimensions."""
    (out,) = call.outputs
    assert out is not None
    return len(_outer(out)) <= MAX_OUTER and all(
        value.stride[-1:] in ((), (1,)) or value.size[-1] == 1 for value in (*call.inputs, out)
    )


def _outer(value: Value) -> tuple[int, ...]:
    return tuple(size for size in value.size[:-1] if size != 1)


def _groups(run: Sequence[tuple[Call, Lower]]) -> list[_Group]:
    groups: list[_Group] = []
    made_in: dict[int, int] = {}
    for call, lower in run:
        (out,) = call.outputs
        assert out is not None
        outer, first = _outer(out), 0
        for value in call.inputs:
            index = made_in.get(value.root)
            if index is not None:
                group = groups[index]
                is_there = (
                    group.outer == outer and _start(value, group.made[value.root]) is not None
                )
                first = max(first, index if is_there else index + 1)
        for index in range(first, len(groups)):
            if groups[index].outer == outer and len(groups[index].calls) < _MAX_CALLS:
                break
        else:
            index = len(groups)
            groups.append(_Group(outer))
        groups[index].calls.append((call, lower))
        groups[index].made[out.root] = out
        made_in[out.root] = index
    return groups


def _start(value: Value, made: Value) -> int | None:
    """Where in the vectors of `made` those of `value`, a view of it, begin; None for another kind of view."""
    start = value.offset - made.offset
    length = value.size[-1] if value.size else 1
    whole = made.size[-1] if made.size else 1
    is_same = (
        _outer(value) == _outer(made)
        and _outer_strides(value) == _outer_strides(made)
        and value.dtype == made.dtype
    )
    return start if is_same and start >= 0 and start + length <= whole else None


def _outer_strides(value: Value) -> tuple[int, ...]:
    pairs = zip(value.size[:-1], value.stride[:-1], strict=True)
    return tuple(stride for size, stride in pairs if size != 1)


def _strides_over(value: Value, out: Value) -> tuple[int, ...]:
    """As `_outer_strides`, over the outer dimensions of `out`, to which it is broadcast."""
    num_outer = max(len(out.size) - 1, 0)
    missing = num_outer - max(len(value.size) - 1, 0)
    sizes = (1,) * missing + value.size[:-1]
    strides = (0,) * missing + value.stride[:-1]
    return tuple(
        0 if size == 1 else stride
        for size, stride, whole in zip(sizes, strides, out.size[:-1], strict=True)
        if whole != 1
    )


class _Writer:
    """Writes one chain; `lowering.Emitter` for its calls."""

    def __init__(self, group: _Group, wanted: set[int]) -> None:
        self._group = group
        self._wanted = wanted
        self._operands: list[Operand] = []
        self._loaded: dict[tuple[Value, tuple[int, ...]], Place] = {}
        self._made: dict[int, tuple[Value, Place]] = {}
        self._instructions: list[Instruction] = []
        self._lengths: list[int] = []
        self._out: Value | None = None

    def chain(self) -> Chain:
        """The whole of it."""
        stores = []
        for call, lower in self._group.calls:
            (out,) = call.outputs
            assert out is not None
            self._out = out
            place = lower(self, call)
            if out.dtype is torch.bfloat16:
                exact, place = place, self.new(place.length)
                self.emit(Code.ROUND, place, exact)
            self._made[out.root] = (out, place)
            if out.root in self._wanted:
                stores.append(out)
                operand = self._operand(out, _outer_strides(out))
                self._instructions.append(Instruction(Code.STORE, None, place, operand=operand))
        return Chain(
            self._group.outer,
            tuple(self._operands),
            *_with_few_registers(self._instructions, self._lengths),
            tuple(stores),
        )

    def read(self, value: Value) -> Place:
        """See `Emitter.read`."""
        assert self._out is not None
        length = value.size[-1] if value.size else 1
        made = self._made.get(value.root)
        if made is not None:
            start = _start(value, made[0])
            assert start is not None  # else it would be in another chain
            return Place(made[1].register, made[1].start + start, length)
        strides = _strides_over(value, self._out)
        place = self._loaded.get((value, strides))
        if place is None:
            place = self._loaded[value, strides] = self.new(length)
            operand = self._operand(value, strides)
            self._instructions.append(Instruction(Code.LOAD, place, None, operand=operand))
        return place

    def new(self, length: int) -> Place:
        """See `Emitter.new`."""
        self._lengths.append(length)
        return Place(len(self._lengths) - 1, 0, length)

    def emit(self, code: Code, out: Place, a: Place, b: Second = None) -> None:
        """See `Emitter.emit`."""
        self._instructions.append(Instruction(code, out, a, b))

    def _operand(self, value: Value, strides: tuple[int, ...]) -> int:
        self._operands.append(Operand(value, strides))
        return len(self._operands) - 1


def _with_few_registers(
    instructions: Sequence[Instruction], lengths: Sequence[int]
) -> tuple[tuple[Instruction, ...], tuple[int, ...]]:
    """The same instructions over registers that are used again once nobody reads what they held."""
    last_use: dict[int, int] = {}
    for index, instruction in enumerate(instructions):
        for place in (instruction.out, instruction.a, instruction.b):
            if isinstance(place, Place):
                last_use[place.register] = index
    over: dict[int, list[int]] = {}
    for register, index in last_use.items():
        over.setdefault(index, []).append(register)
    sizes: list[int] = []
    free: list[int] = []
    given: dict[int, int] = {}
    renamed = []
    for index, instruction in enumerate(instructions):
        out = instruction.out
        if out is not None and out.register not in given:
            length = lengths[out.register]
            fitting = [register for register in free if sizes[register] >= length]
            if fitting:
                given[out.register] = min(fitting, key=lambda register: sizes[register])
                free.remove(given[out.register])
            else:
                given[out.register] = len(sizes)
                sizes.append(length)
        renamed.append(
            replace(
                instruction,
                out=_renamed(out, given),
                a=_renamed(instruction.a, given),
                b=_renamed(instruction.b, given),
            )
        )
        free += [given[register] for register in over.get(index, ())]
    return tuple(renamed), tuple(sizes)


def _renamed(place: Any, given: Mapping[int, int]) -> Any:
    return replace(place, register=given[place.register]) if isinstance(place, Place) else place
