"""The forward hooks: where they are, what each slot holds, and which kernel adds a module's deltas.

Hooks exist only on modules of layers that some row of the step reaches: a base-only step runs on a
model without hooks. What they compute, and for which rows, is `lora`'s.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from server.model import context
from server.model.gathered import GatheredSlots
from server.model.gathered_step import GatheredStep
from server.model.grouped_mm import GroupedProducts
from server.model.lora import LoraWeights, apply_embedding, apply_grouped
from server.model.native.library import load
from server.model.native.lora import NativeLora, Part, Scratch
from server.model.native.structures import DTYPES
from server.model.packed import PackedLinear
from server.model.products import LinearProduct, shared_product
from server.model.segments import Segment


@dataclass(slots=True)
class HookedModule:
    """One target module of the base model and the adapters' weights for it."""

    name: str
    module: nn.Module
    layer_idx: int
    """-1 for the input embedding, num_layers for `lm_head`."""
    weights: dict[int, LoraWeights] = field(default_factory=dict)
    native: NativeLora | None = None
    """For this module and those that share its product."""
    part: int = 0
    """Which of them it is."""
    handle: RemovableHandle | None = None

    @property
    def product(self) -> LinearProduct | None:
        """What its output is part of, if other modules read the same input."""
        return shared_product(self.module)

    @property
    def is_embedding(self) -> bool:
        """Whether the input is token ids."""
        return isinstance(self.module, nn.Embedding)


class LoraHooks:
    """Installs and removes the hooks; holds every slot's weights."""

    def __init__(
        self,
        num_layers: int,
        gathered: GatheredSlots | None = None,
        products: GroupedProducts | None = None,
    ) -> None:
        """gathered: where slots lie on a device that records steps. products: what multiplies several
        segments there, where the device has it.
        """
        self.num_layers = num_layers
        self._gathered = gathered
        self._products = products
        self._modules: dict[str, HookedModule] = {}
        self._by_module: dict[int, HookedModule] = {}
        self._installed_depth = 0
        self.scratch = Scratch()
        """Of the compiled kernel, for all modules."""
        self.num_installed = 0
        """Hooks on the model right now."""
        self.are_compiled = True
        """Whether the compiled kernel does what each of them does, behind a packed product."""
        self.generation = 0
        """Raised whenever `behind` may give something else than before."""

    @property
    def num_kernel_calls(self) -> int:
        """Calls of the compiled kernel so far, which torch's dispatcher does not see."""
        return self.scratch.num_calls

    def load(self, slot: int, weights: dict[str, tuple[nn.Module, int, LoraWeights]]) -> None:
        """Fill a slot. weights: module name -> (module, layer_idx, weights)."""
        for name, (module, layer_idx, lora) in weights.items():
            hooked = self._modules.setdefault(name, HookedModule(name, module, layer_idx))
            self._by_module[id(module)] = hooked
            hooked.weights[slot] = lora
            if self._gathered is not None and slot < self._gathered.num_slots:
                hooked.weights[slot] = self._gathered.put(name, slot, lora)
        self._review()
        self._rebuild(weights)
        self._refresh()

    def weights(self, slot: int) -> dict[str, LoraWeights]:
        """What a slot holds, by module name."""
        return {
            name: hooked.weights[slot]
            for name, hooked in self._modules.items()
            if slot in hooked.weights
        }

    def unload(self, slot: int, names: Collection[str] | None = None) -> None:
        """Empty a slot, or some modules of it; one that no slot targets any more loses its hook."""
        emptied = [
            name
            for name, hooked in self._modules.items()
            if (names is None or name in names) and hooked.weights.pop(slot, None) is not None
        ]
        if self._gathered is not None:
            self._gathered.remove(slot, emptied)
        self._rebuild(emptied)
        self._refresh()

    def _review(self) -> None:
        """Look anew at what lies in stacks that moved, or the old ones would stay in memory."""
        if self._gathered is None:
            return
        for name in self._gathered.take_moved() & self._modules.keys():
            weights = self._modules[name].weights
            for slot, lora in weights.items():
                if slot < self._gathered.num_slots:
                    weights[slot] = self._gathered.view(name, slot, lora)

    def _rebuild(self, names: Iterable[str]) -> None:
        """Tell the compiled kernel what these modules, and those that share their products, hold now."""
        if self._gathered is not None:
            return  # a device that has kernels of its own
        self.generation += 1
        changed = {_sharing(self._modules[name]) for name in names}
        groups: dict[int, list[HookedModule]] = {}
        for hooked in self._modules.values():
            if (key := _sharing(hooked)) in changed:
                hooked.native = None
                if hooked.weights:
                    groups.setdefault(key, []).append(hooked)
        for group in groups.values():
            group.sort(key=lambda hooked: getattr(hooked.module, "first_column", 0))
            native = _native(group)
            for part, hooked in enumerate(group):
                hooked.native, hooked.part = native, part

    def behind(self, modules: Iterable[nn.Module]) -> HookedModule | None:
        """Of a product's readers the first that a slot targets; its `native` is that of all of them."""
        found = (self._by_module.get(id(module)) for module in modules)
        return next((hooked for hooked in found if hooked and hooked.native is not None), None)

    def install(self, depth: int) -> None:
        """Hooks on every targeted module that a step of this largest depth reaches, on no other."""
        self.scratch.num_threads = torch.get_num_threads()
        if depth != self._installed_depth:
            self._installed_depth = depth
            self._refresh()

    def _refresh(self) -> None:
        for hooked in self._modules.values():
            wanted = bool(hooked.weights) and self._is_reached(hooked.layer_idx)
            if wanted and hooked.handle is None:
                hooked.handle = hooked.module.register_forward_hook(
                    LoraHook(hooked, self.scratch, self._products)
                )
            elif not wanted and hooked.handle is not None:
                hooked.handle.remove()
                hooked.handle = None
        installed = [hooked for hooked in self._modules.values() if hooked.handle is not None]
        self.num_installed = len(installed)
        self.are_compiled = all(
            isinstance(one.module, PackedLinear) and one.native is not None for one in installed
        )

    def _is_reached(self, layer_idx: int) -> bool:
        if layer_idx >= self.num_layers:  # lm_head
            return self._installed_depth >= self.num_layers
        return layer_idx < self._installed_depth and self._installed_depth > 0


def _sharing(hooked: HookedModule) -> int:
    """The same for modules that share a product, and for no others."""
    return id(hooked.module if hooked.product is None else hooked.product)


def _native(group: Sequence[HookedModule]) -> NativeLora | None:
    """Modules that share a product, for the compiled kernel, where it can do them."""
    library = load()
    tensors = [lora.lora_A for hooked in group for lora in hooked.weights.values()]
    kinds = {(lora_A.device.type, lora_A.dtype) for lora_A in tensors}
    is_served = len(kinds) == 1 and kinds <= {("cpu", dtype) for dtype in DTYPES}
    if isinstance(library, str) or not is_served or any(hooked.is_embedding for hooked in group):
        return None
    return NativeLora(
        library,
        [
            Part(
                hooked.weights,
                getattr(hooked.module, "bias", None),
                getattr(hooked.module, "first_column", 0),
            )
            for hooked in group
        ],
    )


class LoraHook:
    """`forward_hook(module, args, output)` of one module."""

    def __init__(
        self, hooked: HookedModule, scratch: Scratch, products: GroupedProducts | None
    ) -> None:
        self._hooked = hooked
        self._scratch = scratch
        self._products = products
        self._is_embedding = hooked.is_embedding
        self._product = hooked.product
        self._bias = getattr(hooked.module, "bias", None)
        scale = getattr(hooked.module, "embed_scale", 1.0)
        self._embed_scale = float(scale)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The module's output with the deltas; None where they were added in place."""
        current = context.find()
        plan = current.lora if current is not None else None
        if plan is None:
            return None  # somebody else's forward pass over the model: the base, untouched
        hooked, product = self._hooked, self._product
        if isinstance(plan, GatheredStep):
            return plan.apply(hooked.name, hooked.layer_idx, output, args[0], module)
        first, end = hooked.part, hooked.part + 1
        if product is not None and hooked.native is not None and not plan.is_observed:
            # Whoever comes first adapts for those after it, which find their columns as they should be.
            end = hooked.native.num_parts if product.adapted_from is None else product.adapted_from
            if first >= end:
                return None
            product.adapted_from = first
        y = output.view(-1, output.shape[-1])
        segments = plan.reached(hooked.name, hooked.layer_idx, y.shape[0])
        before = y.clone() if plan.is_observed else None
        if self._is_embedding:
            apply_embedding(y, args[0].reshape(-1), segments, hooked.weights, self._embed_scale)
        else:
            x = args[0].reshape(-1, args[0].shape[-1])
            if hooked.native is not None:
                hooked.native.apply(y, x, segments, self._scratch, first, end)
            else:
                alone: Sequence[Segment] = segments
                if self._products is not None:
                    special = self._products.special(hooked.weights)
                    alone = self._products.apply(y, x, segments, hooked.name, special)
                apply_grouped(y, x, alone, hooked.weights, self._bias)
        if before is not None:
            plan.added(hooked.layer_idx, before, y)
        return None
