"""A tape run again with one kernel a chain, for a device that records what is launched.

`program` runs a tape many times, so it binds all it can beforehand; this one is run while a CUDA graph is
captured and never again, so it only has to launch the right things. Memory comes from the allocator, which
during a capture is the graph's own, and goes back as soon as nobody reads it any more.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from server.model.replay.chain import Chain, fused
from server.model.replay.lifetimes import over_after
from server.model.replay.tape import Call, Tape, Value
from server.model.replay.trees import leaves, mapped

RunChain = Callable[[Sequence[Tensor]], None]
"""Runs a chain over a tensor for each of its operands, each of that operand's size and strides."""
BindChain = Callable[[Chain, Collection[int]], RunChain]
"""Of a chain, and which of its operands are one number in the host's memory."""
Join = Callable[[], None]
Beside = Callable[[Callable[[], None]], Join]
"""Launches something that waits for what came before the fork; `Join` makes what comes after wait for it."""
Fork = Callable[[], Beside]


class LoweredStep:
    """What a noted pass does, ready to be done again over the same inputs."""

    def __init__(
        self,
        tape: Tape,
        result: Value,
        bind: BindChain,
        device: torch.device,
        is_aside: Callable[[Call], bool] = lambda call: False,
        fetch_of: Callable[[Sequence[Call]], Callable[[], None] | None] = lambda calls: None,
    ) -> None:
        """device: where the step runs. is_aside: whether a call may run beside those that come between the
        last change of what it reads and itself. fetch_of: of calls that do, what may be launched before
        that change, so that they find sooner what else they read.
        """
        self._given = tape.given
        self._device = device
        self._result = result
        self._steps = fused(tape.calls, [result])
        self._run_chains = [
            bind(step, self._on_host(step)) if isinstance(step, Chain) else None
            for step in self._steps
        ]
        self._over = [
            [root for root in over if root not in tape.given]
            for over in over_after(self._steps, [result])
        ]
        self._aside_after: dict[int, list[int]] = {}
        """By the step that makes the last of their inputs, the calls that are launched then, in order. All
        of them are waited for where the first of them stood."""
        self._is_aside: set[int] = set()
        made_at: dict[int, int] = {}
        """By memory, the step that changed it last; what is made aside is there for others aside."""
        there_aside: dict[int, int] = {}
        for index, step in enumerate(self._steps):
            made = step.stores if isinstance(step, Chain) else step.outputs
            made_at |= {value.root: index for value in made if value is not None}
            if isinstance(step, Call) and is_aside(step):
                since = made_at | there_aside
                ready = max((since.get(value.root, -1) for value in step.inputs), default=-1)
                if 0 <= ready < index - 1:
                    self._aside_after.setdefault(ready, []).append(index)
                    self._is_aside.add(index)
                    there_aside |= {v.root: ready for v in made if v is not None}
        self._fetch_beside: dict[int, Callable[[], None]] = {}
        """By the step that makes the last of their inputs: nobody waits for memory then."""
        for ready, others in self._aside_after.items():
            fetch = fetch_of([call for i in others if isinstance(call := self._steps[i], Call)])
            if fetch is not None:
                self._fetch_beside[ready] = fetch

    @property
    def num_chains(self) -> int:
        """How many kernels stand for chains."""
        return sum(run is not None for run in self._run_chains)

    @property
    def num_aside(self) -> int:
        """How many calls run beside others."""
        return len(self._is_aside)

    def run(self, fork: Fork) -> Tensor:
        """Launch all of it; returns the result, new.

        Of what runs at once the step that all wait for is launched first: it goes on where the step before
        it ended, without a wait, and what is small takes the processors that it leaves.
        """
        memory = _Memory(self._given, self._device)
        joins: dict[int, Join] = {}
        forked: tuple[Beside, list[int]] | None = None
        for index, step in enumerate(self._steps):
            if index in joins:
                joins.pop(index)()
            beside_this = fork() if index in self._fetch_beside else None
            if index in self._is_aside:
                pass  # memory goes back as if it had run here, so nobody writes to what it reads
            elif isinstance(step, Chain):
                run = self._run_chains[index]
                assert run is not None
                for value in step.stores:
                    memory.make(value)
                run([memory.tensor(operand.value) for operand in step.operands])
            else:
                memory.call(step)
            if forked is not None:
                # Before memory goes back that this step reads, for it may still be running then.
                beside, others = forked
                joins[others[0]] = beside(partial(self._launch, others, memory))
                forked = None
            if beside_this is not None:
                # Those who need it come after it on the same stream, so nobody else joins.
                beside_this(self._fetch_beside[index])
            memory.forget(self._over[index])
            if index in self._aside_after:
                forked = fork(), self._aside_after[index]
        return memory.tensor(self._result)

    def _launch(self, indices: Sequence[int], memory: "_Memory") -> None:
        for index in indices:
            call = self._steps[index]
            assert isinstance(call, Call)
            memory.call(call)

    def _on_host(self, chain: Chain) -> list[int]:
        return [
            index
            for index, operand in enumerate(chain.operands)
            if (given := self._given.get(operand.value.root)) is not None
            and given.device != self._device
        ]


class _Memory:
    """The tensors of one run, by the memory that they are views of."""

    def __init__(self, given: dict[int, Tensor], device: torch.device) -> None:
        self._given = given
        self._device = device
        self._made: dict[int, Tensor] = {}
        # Equal values are the same object, as they were to the model: some callees go by that.
        self._views: dict[Value, Tensor] = {}

    def make(self, value: Value) -> None:
        num_elements = value.offset + value.extent
        self._made[value.root] = torch.empty(num_elements, dtype=value.dtype, device=self._device)

    def call(self, call: Call) -> None:
        """Make a call and keep what it made; one that writes to memory that is there makes none."""
        args, kwargs = mapped(self._of_leaf, (call.args, call.kwargs))
        result = call.function(*args, **kwargs)
        for value, leaf in zip(call.outputs, leaves(result), strict=True):
            if value is None or value.root in self._given or value.root in self._made:
                continue
            self._made[value.root] = leaf
            if leaf.size() == value.size and leaf.stride() == value.stride:
                self._views[value] = leaf

    def _of_leaf(self, leaf: Any) -> Any:
        return self.tensor(leaf) if isinstance(leaf, Value) else leaf

    def tensor(self, value: Value) -> Tensor:
        known = self._views.get(value)
        if known is None:
            memory = self._made.get(value.root)
            if memory is None:
                memory = self._given[value.root]
            known = memory
            if memory.layout is torch.strided:
                known = torch.as_strided(memory, value.size, value.stride, value.offset)
            self._views[value] = known
        return known

    def forget(self, roots: Sequence[int]) -> None:
        if not roots:
            return
        for root in roots:
            self._made.pop(root, None)
        gone = set(roots)
        for value in [value for value in self._views if value.root in gone]:
            del self._views[value]
