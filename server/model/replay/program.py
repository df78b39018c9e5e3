"""A tape made ready to run again: what kernels do in a row is one call, everything else as it was.

What kernels write lies in an arena, at addresses that do not change from run to run; what torch's operators
return is new each time. A run is right for whatever the tensors hold that the pass was given, as nothing
else of it can change but what `struct pass` says.
"""

import ctypes
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from server.model.native.library import Library
from server.model.native.structures import Pass, Step
from server.model.replay.bound import Bound
from server.model.replay.bound_chain import BoundChain
from server.model.replay.lifetimes import over_after
from server.model.replay.tape import Call, Value
from server.model.replay.trees import leaves, mapped

_ALIGNMENT = 64


class Arena:
    """Memory that the programs of one model share, as no two of them run at once."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """As large as it is now."""
        return len(self._bytes)

    def of(self, num_bytes: int) -> Tensor:
        """uint8 `[at least num_bytes]`; what was given out before stays valid memory, but another's."""
        if len(self._bytes) < num_bytes:
            # Programs keep what they were given, so it grows in few steps.
            self._bytes = torch.empty(max(num_bytes, 2 * len(self._bytes)), dtype=torch.uint8)
        return self._bytes


_Run = Callable[[], None]
_BEGUN = ctypes.CFUNCTYPE(None)


class Program:
    """One pass, for as long as its arena is the one it was made for."""

    def __init__(
        self,
        steps: Sequence[Call | Bound],
        given: Mapping[int, Tensor],
        results: Sequence[Value],
        library: Library,
        num_threads: int,
        arena: Arena,
        run: Pass,
        room: Mapping[int, int] | None = None,
    ) -> None:
        """steps, given: what `bound_steps` made of a tape, and what that was given. run: what steps are told
        of each run, which the caller fills before. room: by root, bytes behind what kernels make of it.
        """
        self.num_chains = sum(isinstance(step, BoundChain) for step in steps)
        self.num_calls = sum(isinstance(step, Call) for step in steps)
        self._library, self._num_threads, self._pass = library, num_threads, run
        self._given = given
        over = over_after(steps, results)
        self._starts, num_bytes = _plan(steps, over, room or {})
        self._arena = arena.of(num_bytes)
        self._made: dict[int, Tensor] = {}
        """By root, what torch's operators returned in this run."""
        self._outputs = _made_by_calls(steps, self._starts.keys() | given.keys())
        self._owned: list[object] = []
        self._before: Callable[[], None] | None = None
        self._failure: BaseException | None = None
        self._begun = _BEGUN(self._call_before)
        self._steps: list[_Run] = []
        pairs = zip(steps, over, strict=True)
        groups = [
            (is_bound, list(group))
            for is_bound, group in groupby(pairs, lambda pair: isinstance(pair[0], Bound))
        ]
        longest = max((own for is_bound, own in groups if is_bound), key=len, default=None)
        self._has_kernels = longest is not None
        for is_bound, own in groups:
            if is_bound:
                kernels = [step for step, _ in own if isinstance(step, Bound)]
                self._steps.append(self._kernels(kernels, is_longest=own is longest))
                self._forget([root for _, roots in own for root in roots])
                continue
            for step, roots in own:
                assert isinstance(step, Call)
                self._steps.append(self._call(step))
                self._forget(roots)
        self._results = [self._reader(value) for value in results]

    def run(self, before: Callable[[], None] | None = None) -> list[Tensor]:
        """The results; those in the arena are valid until any program of it runs.

        before: called while those kernels compute for which the GIL is let go for longest. Whoever it wakes
        would sooner take it from torch's operators, or this thread's core before others share the work.
        """
        self._before = before
        try:
            if before is not None and not self._has_kernels:
                before()
            for step in self._steps:
                step()
            if self._failure is not None:
                raise self._failure
            return [read() for read in self._results]
        finally:
            self._failure = None
            self._made.clear()

    def _call_before(self) -> None:
        assert self._before is not None
        try:
            self._before()
        except BaseException as failure:  # noqa: BLE001 -- no exception passes through compiled code
            self._failure = failure

    def _kernels(self, steps: Sequence[Bound], *, is_longest: bool) -> _Run:
        """All of them in one call, for which the GIL is let go once."""
        moving: list[tuple[Callable[[int, int], None], int, Value]] = []
        for step in steps:
            for index, value in enumerate(step.operands):
                if value.root in self._outputs:
                    moving.append((step.place, index, value))
                else:
                    step.place(index, self._start_of(value))
        entries = (Step * len(steps))(
            *(
                Step(self._library.addresses[step.kernel], ctypes.addressof(step.call))
                for step in steps
            )
        )
        self._owned.append((entries, steps))
        kernel = self._library.functions.fathom_run_steps
        first, length, num_threads = ctypes.addressof(entries), len(entries), self._num_threads
        told, address = self._pass, ctypes.addressof(self._pass)
        made, outputs = self._made, self._outputs
        begun = ctypes.cast(self._begun, ctypes.c_void_p).value if is_longest else None

        def run() -> None:
            for place, index, value in moving:
                offset = value.offset - outputs[value.root].offset
                place(index, made[value.root].data_ptr() + offset * value.dtype.itemsize)
            told.begun = None if self._before is None else begun
            kernel(first, length, num_threads, address)

        return run

    def _call(self, call: Call) -> _Run:
        function, kwargs, made = call.function, call.kwargs, self._made
        roots = [
            o.root if o is not None and self._outputs.get(o.root) is o else None
            for o in call.outputs
        ]

        def keep(result: Any) -> None:
            for root, part in zip(roots, leaves(result), strict=True):
                if root is not None:
                    made[root] = part

        if _has_values(kwargs) or any(
            not isinstance(arg, Value) and _has_values(arg) for arg in call.args
        ):

            def general() -> None:
                args, given = mapped(
                    lambda leaf: self._reader(leaf)() if isinstance(leaf, Value) else leaf,
                    (call.args, kwargs),
                )
                keep(function(*args, **given))

            return general
        readers: list[tuple[int, Callable[[], Tensor]]] = []
        fixed = list(call.args)
        for index, arg in enumerate(call.args):
            if isinstance(arg, Value):
                if arg.root in self._outputs:
                    readers.append((index, self._reader(arg)))
                else:
                    fixed[index] = self._reader(arg)()

        def step() -> None:
            for index, read in readers:
                fixed[index] = read()
            keep(function(*fixed, **kwargs))

        return step

    def _forget(self, roots: Iterable[int]) -> None:
        """As the next thing of each run, of what torch's operators returned."""
        forgotten, made = [root for root in roots if root in self._outputs], self._made

        def step() -> None:
            for root in forgotten:
                made.pop(root, None)

        if forgotten:
            self._steps.append(step)

    def _start_of(self, value: Value) -> int:
        """Address of a value in memory that does not move."""
        if value.root in self._starts:
            start = self._arena.data_ptr() + self._starts[value.root]
            return start + value.offset * value.dtype.itemsize
        tensor = self._given[value.root]
        start = tensor.data_ptr() - int(tensor.storage_offset()) * tensor.itemsize
        return start + value.offset * value.dtype.itemsize

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
    return any(isinstance(leaf, Value) for leaf in leaves(tree))


def _made_by_calls(steps: Iterable[Call | Bound], known: Collection[int]) -> dict[int, Value]:
    """By root, the output that is its memory; a call that writes into known memory makes none."""
    outputs: dict[int, Value] = {}
    for step in steps:
        if isinstance(step, Call):
            for output in step.outputs:
                if output is not None and output.root not in known:
                    outputs.setdefault(output.root, output)
    return outputs


def _plan(
    steps: Sequence[Call | Bound], over_after: Sequence[Sequence[int]], room: Mapping[int, int]
) -> tuple[dict[int, int], int]:
    """By root, where in the arena lies what kernels make, in bytes, and how large it must be."""
    places: dict[int, tuple[int, int]] = {}  # start and size
    free: dict[int, list[int]] = {}
    end = 0
    for step, over in zip(steps, over_after, strict=True):
        for value in step.stores if isinstance(step, Bound) else ():
            size = _aligned(value.extent * value.dtype.itemsize + room.get(value.root, 0))
            if free.get(size):
                start = free[size].pop()
            else:
                start, end = end, end + size
            places[value.root] = (start, size)
        for root in over:
            if root in places:
                start, size = places[root]
                free.setdefault(size, []).append(start)
    return {root: start for root, (start, _) in places.items()}, end


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
