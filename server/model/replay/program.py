"""A tape made ready to run again: chains bound to memory, everything else called as it was.

What chains write lies in an arena, at addresses that do not change from run to run; what torch's
operators return is new each time. A run is right for whatever the tensors hold that the pass was given,
as nothing else of it can change but the calls that are made again as they were (paged attention).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from server.model.native.library import Library
from server.model.replay.bound import BoundChain
from server.model.replay.chain import Chain, fused
from server.model.replay.lifetimes import over_after
from server.model.replay.tape import Bindable, Call, Tape, Value

_ALIGNMENT = 64


class Arena:
    """Memory that the programs of one model share, as no two of them run at once."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, num_bytes: int) -> Tensor:
        """uint8 `[at least num_bytes]`; what was given out before stays valid memory, but another's."""
        if len(self._bytes) < num_bytes:
            # Programs keep what they were given, so it grows in few steps.
            self._bytes = torch.empty(max(num_bytes, 2 * len(self._bytes)), dtype=torch.uint8)
        return self._bytes


class AfterCall(Protocol):
    """What happens to a call's output before anybody reads it: LoRA."""

    def __call__(self, args: Sequence[Any], output: Tensor) -> None:
        """args: the call's, with tensors."""


_Step = Callable[[], None]


class Program:
    """One pass, for as long as its arena is the one it was made for."""

    def __init__(
        self,
        tape: Tape,
        results: Sequence[Value],
        library: Library,
        num_threads: int,
        arena: Arena,
        after: Callable[[Call], AfterCall | None],
    ) -> None:
        """after: what belongs behind a call, asked once for each."""
        steps = fused(tape.calls, results)
        self.num_chains = sum(isinstance(step, Chain) for step in steps)
        self.num_calls = len(steps) - self.num_chains
        self._given = tape.given
        over = over_after(steps, results)
        places, num_bytes = _plan([_placed(step) for step in steps], over)
        self._arena = arena.of(num_bytes)
        self._starts = {root: start for root, (start, _) in places.items()}
        self._made: dict[int, Tensor] = {}
        """By root, what torch's operators returned in this run."""
        self._outputs = _made_by_calls(steps, places.keys() | tape.given.keys())
        self._steps: list[_Step] = []
        for index, step in enumerate(steps):
            forgotten = [root for root in over[index] if root in self._outputs]
            if isinstance(step, Chain):
                self._steps.append(self._chain(step, library, num_threads))
            else:
                self._steps.append(self._call(step, after(step)))
            if forgotten:
                self._steps.append(self._forget(forgotten))
        self._results = [self._reader(value) for value in results]

    def run(self) -> list[Tensor]:
        """The results; those in the arena are valid until any program of it runs."""
        try:
            for step in self._steps:
                step()
            return [read() for read in self._results]
        finally:
            self._made.clear()

    def _chain(self, chain: Chain, library: Library, num_threads: int) -> _Step:
        bound = BoundChain(chain, library, num_threads)
        moving: list[tuple[int, Value]] = []
        for index, operand in enumerate(chain.operands):
            value = operand.value
            if value.root in self._outputs:
                moving.append((index, value))
            else:
                bound.place(index, value, self._start_of(value.root))
        run, place, made, outputs = bound.run, bound.place, self._made, self._outputs
        if not moving:
            return run

        def step() -> None:
            for index, value in moving:
                output = made[value.root]
                start = output.data_ptr() - outputs[value.root].offset * value.dtype.itemsize
                place(index, value, start)
            run()

        return step

    def _call(self, call: Call, after: AfterCall | None) -> _Step:
        function, kwargs, made = call.function, call.kwargs, self._made
        readers: list[tuple[int, Callable[[], Tensor]]] = []
        fixed = list(call.args)
        is_flat = not _has_values(kwargs) and all(
            isinstance(arg, Value) or not _has_values(arg) for arg in call.args
        )
        for index, arg in enumerate(call.args):
            if isinstance(arg, Value):
                if arg.root in self._outputs:
                    readers.append((index, self._reader(arg)))
                else:
                    fixed[index] = self._reader(arg)()
        roots = [
            o.root if o is not None and self._outputs.get(o.root) is o else None
            for o in call.outputs
        ]

        only = roots[0] if len(roots) == 1 else None

        def keep(result: Any) -> None:
            for root, part in zip(roots, tree_leaves(result), strict=True):
                if root is not None:
                    made[root] = part

        def step() -> None:
            for index, read in readers:
                fixed[index] = read()
            result = function(*fixed, **kwargs)
            if after is not None:
                after(fixed, result)
            if only is not None:
                made[only] = result
            else:
                keep(result)

        assert is_flat or after is None
        if _can_bind(call):
            return self._bound_call(call, after, fixed, readers)

        def general() -> None:
            args, given = tree_map(
                lambda leaf: self._reader(leaf)() if isinstance(leaf, Value) else leaf,
                (call.args, kwargs),
            )
            keep(function(*args, **given))

        return step if is_flat else general

    def _bound_call(
        self,
        call: Call,
        after: AfterCall | None,
        fixed: list[Any],
        readers: Sequence[tuple[int, Callable[[], Tensor]]],
    ) -> _Step:
        """A call that writes into the arena."""
        (value,) = call.outputs
        assert value is not None
        output = self._fixed(value)
        function: Bindable = call.function  # type: ignore[assignment]
        write = function.bound(output)

        def step() -> None:
            for index, read in readers:
                fixed[index] = read()
            write(*fixed)
            if after is not None:
                after(fixed, output)

        return step

    def _forget(self, roots: Sequence[int]) -> _Step:
        made = self._made

        def step() -> None:
            for root in roots:
                made.pop(root, None)

        return step

    def _start_of(self, root: int) -> int:
        """Address of memory that does not move."""
        if root in self._starts:
            return self._arena.data_ptr() + self._starts[root]
        tensor = self._given[root]
        return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.itemsize

    def _fixed(self, value: Value) -> Tensor:
        """A value in memory that does not move."""
        if value.root in self._starts:
            memory = self._arena.view(value.dtype)
            first = self._starts[value.root] // value.dtype.itemsize
            return torch.as_strided(memory, value.size, value.stride, first + value.offset)
        tensor = self._given[value.root]
        if tensor.layout is not torch.strided:
            return tensor
        return torch.as_strided(tensor, value.size, value.stride, value.offset)

    def _reader(self, value: Value) -> Callable[[], Tensor]:
        """Gives the tensor that a value is in this run."""
        root = value.root
        if root not in self._outputs:
            tensor = self._fixed(value)
            return lambda: tensor
        made, output = self._made, self._outputs[root]
        if (value.size, value.stride, value.offset) == (output.size, output.stride, output.offset):
            return lambda: made[root]
        size, stride, offset = value.size, value.stride, value.offset
        return lambda: torch.as_strided(made[root], size, stride, offset)


def _has_values(tree: Any) -> bool:
    return any(isinstance(leaf, Value) for leaf in tree_leaves(tree))


def _made_by_calls(steps: Sequence[Call | Chain], known: Collection[int]) -> dict[int, Value]:
    """By root, the output that is its memory; a call that writes into known memory makes none."""
    outputs: dict[int, Value] = {}
    for step in steps:
        if isinstance(step, Call):
            for output in step.outputs:
                if output is not None and output.root not in known:
                    outputs.setdefault(output.root, output)
    return outputs


def _placed(step: Call | Chain) -> Sequence[Value]:
    """What a step writes to where it is told."""
    if isinstance(step, Chain):
        return step.stores
    if not _can_bind(step):
        return ()
    (output,) = step.outputs
    assert output is not None
    return (output,)


def _can_bind(call: Call) -> bool:
    return getattr(call.function, "can_bind", False)


def _plan(
    placed: Sequence[Sequence[Value]], over_after: Sequence[Sequence[int]]
) -> tuple[dict[int, tuple[int, Value]], int]:
    """Where in the arena lies what each step places there, in bytes, and how large it must be."""
    places: dict[int, tuple[int, Value]] = {}
    free: dict[int, list[int]] = {}
    end = 0
    for values, over in zip(placed, over_after, strict=True):
        for value in values:
            size = _span(value)
            if free.get(size):
                start = free[size].pop()
            else:
                start, end = end, end + size
            places[value.root] = (start, value)
        for root in over:
            if root in places:
                start, value = places[root]
                free.setdefault(_span(value), []).append(start)
    return places, end


def _span(value: Value) -> int:
    """Bytes from the first element to behind the last, aligned."""
    num_bytes = value.extent * value.dtype.itemsize
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
