"""A tape run again with one kernel a chain, for a device that records what is launched.

`program` runs a tape many times, so it binds all it can beforehand; this one is run while a CUDA graph is
captured and never again, so it only has to launch the right things. Memory comes from the allocator, which
during a capture is the graph's own, and goes back as soon as nobody reads it any more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from server.model.replay.chain import Chain, fused
from server.model.replay.lifetimes import over_after
from server.model.replay.tape import Call, Tape, Value

RunChain = Callable[[Sequence[Tensor]], None]
"""Runs a chain over a tensor for each of its operands, each of that operand's size and strides."""
BindChain = Callable[[Chain], RunChain]


class LoweredStep:
    """What a noted pass does, ready to be done again over the same inputs."""

    def __init__(self, tape: Tape, result: Value, bind: BindChain) -> None:
        self._given = tape.given
        self._result = result
        self._steps: list[tuple[Call | Chain, RunChain | None, list[int]]] = []
        steps = fused(tape.calls, [result])
        for step, over in zip(steps, over_after(steps, [result]), strict=True):
            run = bind(step) if isinstance(step, Chain) else None
            self._steps.append((step, run, [root for root in over if root not in tape.given]))

    @property
    def num_chains(self) -> int:
        """How many kernels stand for chains."""
        return sum(run is not None for _, run, _ in self._steps)

    def run(self) -> Tensor:
        """Launch all of it; returns the result, new."""
        memory = _Memory(self._given)
        for step, run, over in self._steps:
            if isinstance(step, Chain):
                assert run is not None
                for value in step.stores:
                    memory.make(value)
                run([memory.tensor(operand.value) for operand in step.operands])
            else:
                args, kwargs = tree_map(memory.of_leaf, (step.args, step.kwargs))
                memory.keep(step, step.function(*args, **kwargs))
            memory.forget(over)
        return memory.tensor(self._result)


class _Memory:
    """The tensors of one run, by the memory that they are views of."""

    def __init__(self, given: dict[int, Tensor]) -> None:
        self._given = given
        self._made: dict[int, Tensor] = {}
        # Equal values are the same object, as they were to the model: some callees go by that.
        self._views: dict[Value, Tensor] = {}

    def make(self, value: Value) -> None:
        pairs = zip(value.size, value.stride, strict=True)
        num_elements = value.offset + 1 + sum((size - 1) * stride for size, stride in pairs)
        like = next(iter(self._given.values()))
        self._made[value.root] = torch.empty(num_elements, dtype=value.dtype, device=like.device)

    def keep(self, call: Call, result: Any) -> None:
        """What a call made; one that writes into memory that is there already makes none."""
        for value, leaf in zip(call.outputs, tree_leaves(result), strict=True):
            if value is None or value.root in self._given or value.root in self._made:
                continue
            self._made[value.root] = leaf
            if leaf.size() == value.size and leaf.stride() == value.stride:
                self._views[value] = leaf

    def of_leaf(self, leaf: Any) -> Any:
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
        for root in roots:
            self._made.pop(root, None)
        gone = set(roots)
        for value in [value for value in self._views if value.root in gone]:
            del self._views[value]
