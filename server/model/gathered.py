"""The stacks of one base model: which module has which, and what adapters put into them.

Whoever records a step asks for its `signature`: equal ones mean that the record is still right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from server.model.gathered_kernel import GatheredKernel, TorchKernel
from server.model.products import ProductLinear, shared_product
from server.model.stacks import SharedInput, StackedModule

if TYPE_CHECKING:
    from server.model.lora import LoraWeights
    from server.model.targets import Target

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that may be given one input, where they are no product, which says it. Whether
they are is seen at every call."""


def pick_kernel(device: torch.device) -> GatheredKernel:
    """Triton's on a CUDA device that has it, else torch's."""
    if device.type == "cuda":
        try:
            from server.model.triton_lora import TritonKernel
        except ImportError:
            return TorchKernel()
        return TritonKernel()
    return TorchKernel()


class GatheredSlots:
    """The stacks of one base model, by module name. Slots from 0 to `num_slots` lie in them."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        kernel: GatheredKernel | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.kernel = pick_kernel(device) if kernel is None else kernel
        self.generation = 0
        """Differs whenever `signature` may."""
        self._targets = targets
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._modules: dict[str, StackedModule] = {}
        self._moved: set[str] = set()

    def find(self, name: str) -> StackedModule | None:
        """A module that some slot targets, or once did."""
        return self._modules.get(name)

    def put(self, name: str, slot: int, lora: LoraWeights) -> LoraWeights:
        """Copy weights into a slot; returns them as they lie there."""
        module = self._modules.get(name)
        if module is None:
            module = self._make(name)
        self.generation += 1
        if module.group.put(module.index, slot, lora):
            names = {id(member): name for name, member in self._modules.items()}
            self._moved.update(names[id(member)] for member in module.group.modules)
        return module.group.view(module.index, slot, lora)

    def view(self, name: str, slot: int, lora: LoraWeights) -> LoraWeights:
        """What a slot holds, where it lies now."""
        module = self._modules[name]
        return module.group.view(module.index, slot, lora)

    def take_moved(self) -> set[str]:
        """Modules whose stacks moved since this was last asked: earlier views are of the old ones."""
        moved, self._moved = self._moved, set()
        return moved

    def remove(self, slot: int, names: Iterable[str]) -> None:
        """Take these modules out of a slot."""
        for name in names:
            module = self._modules.get(name)
            if module is not None and slot in module.slots:
                self.generation += 1
                module.group.remove(module.index, slot)

    def signature(self, depth: int) -> tuple[tuple[str, int], ...]:
        """What a step of this largest depth reads: which modules, and which version of their stacks.

        Equal signatures mean equal addresses and equal hooks, so a step that was recorded under one
        is right under the other.
        """
        return tuple(
            (name, module.group.num_moves)
            for name, module in self._modules.items()
            if module.slots and depth > 0 and module.needed_depth <= depth
        )

    def _make(self, name: str) -> StackedModule:
        members = self._siblings(name)
        group = SharedInput(
            [self._targets[member] for member in members], self.num_slots, self._like
        )
        self._modules.update(zip(members, group.modules, strict=True))
        return self._modules[name]

    def _siblings(self, name: str) -> list[str]:
        """Those that are stacked with it, itself among them."""
        target = self._targets[name]
        product = shared_product(target.module)
        if product is not None:
            readers = [
                (other.module.first_column, path)
                for path, other in self._targets.items()
                if isinstance(other.module, ProductLinear) and other.module.product is product
            ]
            return [path for _, path in sorted(readers)]
        parent, _, own = name.rpartition(".")
        names = next((names for names in SHARED_INPUTS if own in names), (own,))
        paths = [f"{parent}.{sibling}" if parent else sibling for sibling in names]
        return [
            path
            for path in paths
            if (other := self._targets.get(path)) is not None
            and other.in_features == target.in_features
            and shared_product(other.module) is None
        ]
