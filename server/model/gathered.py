"""Adapters' weights where the gathered kernel reads them, and a step that applies them row by row.

Every slot's weights for one module lie side by side in one stack, so that a step needs no more than
each row's slot and depth to know what to add: the tensors' addresses stay what they are while
adapters come and go, which is what lets a recorded step (`graphs`) run again with others. Modules that
share an input (q, k and v; gate and up) share the stack of `lora_A`, and one product.

A stack is as wide as its widest adapter, rounded up to one of `RANKS`; the rest is zeros. It grows when
a wider one comes, which moves it: `signature` then differs, and what was recorded is void.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from server.errors import ModelError
from server.model.gathered_kernel import (
    DownProjections,
    GatheredKernel,
    Rows,
    TorchKernel,
    UpProjection,
)

if TYPE_CHECKING:
    from server.model.lora import LoraWeights
    from server.model.targets import Target

RANKS = (8, 16, 32, 64, 128, 256)
"""Widths of stacks; above the last, multiples of it."""
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that may be given one input. Whether they are is seen at every call."""


def stack_rank(rank: int) -> int:
    """The width of a stack that holds an adapter of `rank`."""
    widest = RANKS[-1]
    return next((width for width in RANKS if width >= rank), -(-rank // widest) * widest)


def pick_kernel(device: torch.device) -> GatheredKernel:
    """Triton's on a CUDA device that has it, else torch's."""
    if device.type == "cuda":
        try:
            from server.model.triton_lora import TritonKernel
        except ImportError:
            return TorchKernel()
        return TritonKernel()
    return TorchKernel()


class StackedModule:
    """One module's part of its group's stacks."""

    def __init__(self, target: Target, group: SharedInput, index: int) -> None:
        self.target = target
        self.group = group
        self.index = index
        self.needed_depth = target.layer_idx + (target.kind != "lm_head")
        """The least depth that reaches it, beside 0, which reaches nothing."""
        self.slots: set[int] = set()
        """Those that target this module."""
        self.up: UpProjection | None = None
        """None until a slot does."""
        # An embedding that scales its output scales what LoRA adds to it, too.
        self.scale = float(getattr(target.module, "embed_scale", 1.0))


class SharedInput:
    """Modules with one input: `lora_A` of all of them in one tensor, `lora_B` of each in its own."""

    def __init__(self, targets: list[Target], num_slots: int, like: Tensor) -> None:
        """like: empty, of the model's dtype and device."""
        self._num_slots = num_slots
        self._like = like
        self._in_features = targets[0].in_features
        self.rank = 0
        self.num_moves = 0
        """How often a tensor has been replaced by another."""
        self.modules = [StackedModule(target, self, index) for index, target in enumerate(targets)]
        ranks = like.new_zeros((len(targets), num_slots), dtype=torch.int32)
        self.down = DownProjections(
            self._zeros(len(targets), num_slots, 0, self._in_features), ranks
        )

    def put(self, index: int, slot: int, lora: LoraWeights) -> bool:
        """Copy a module's weights into a slot; returns whether anything moved."""
        module, rank = self.modules[index], lora.lora_A.shape[0]
        num_moves = self.num_moves
        if rank > self.rank:
            self._widen(stack_rank(rank))
        up = self._up(module, lora)
        self.down.lora_A[index, slot].zero_()[:rank].copy_(lora.lora_A)
        up.lora_B[slot].zero_()[:, :rank].copy_(lora.lora_B)
        up.scaling[slot] = lora.scaling * module.scale
        if up.bias is not None:
            up.bias[slot].copy_(lora.bias) if lora.bias is not None else up.bias[slot].zero_()
        if up.gain is not None:
            up.gain[slot].copy_(lora.gain) if lora.gain is not None else up.gain[slot].fill_(1.0)
        self.down.ranks[index, slot] = rank
        module.slots.add(slot)
        return self.num_moves > num_moves

    def remove(self, index: int, slot: int) -> None:
        """Take a module out of a slot. Zeros are left, so that products over all slots find no NaN."""
        module = self.modules[index]
        module.slots.discard(slot)
        self.down.ranks[index, slot] = 0
        self.down.lora_A[index, slot].zero_()
        if module.up is not None:
            module.up.lora_B[slot].zero_()

    def view(self, index: int, slot: int, lora: LoraWeights) -> LoraWeights:
        """The same weights, where they lie here."""
        up = self.modules[index].up
        assert up is not None
        rank = lora.lora_A.shape[0]
        return replace(
            lora, lora_A=self.down.lora_A[index, slot, :rank], lora_B=up.lora_B[slot, :, :rank]
        )

    def _zeros(self, *shape: int) -> Tensor:
        return self._like.new_zeros(shape)

    def _widen(self, rank: int) -> None:
        wider = self._zeros(len(self.modules), self._num_slots, rank, self._in_features)
        wider[:, :, : self.rank].copy_(self.down.lora_A)
        self.down = replace(self.down, lora_A=wider)
        for module in self.modules:
            if module.up is not None:
                lora_B = self._zeros(self._num_slots, module.target.out_features, rank)
                lora_B[:, :, : self.rank].copy_(module.up.lora_B)
                module.up = replace(module.up, lora_B=lora_B)
        self.rank = rank
        self.num_moves += 1

    def _up(self, module: StackedModule, lora: LoraWeights) -> UpProjection:
        up, size = module.up, (self._num_slots, module.target.out_features)
        if up is None:
            up = UpProjection(
                lora_B=self._zeros(*size, self.rank),
                ranks=self.down.ranks[module.index],
                scaling=self._like.new_zeros(self._num_slots, dtype=torch.float32),
                bias=None,
                gain=None,
            )
        if up.bias is None and lora.bias is not None:
            up = replace(up, bias=self._zeros(*size))
        if up.gain is None and lora.gain is not None:
            up = replace(up, gain=self._like.new_ones(size))
        if up is not module.up:
            module.up = up
            self.num_moves += 1
        return up


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
        members = list(self._siblings(name))
        group = SharedInput(
            [self._targets[member] for member in members], self.num_slots, self._like
        )
        self._modules.update(zip(members, group.modules, strict=True))
        return self._modules[name]

    def _siblings(self, name: str) -> Iterator[str]:
        parent, _, own = name.rpartition(".")
        target = self._targets[name]
        names = next((names for names in SHARED_INPUTS if own in names), (own,))
        for sibling in names:
            path = f"{parent}.{sibling}" if parent else sibling
            other = self._targets.get(path)
            if other is not None and other.in_features == target.in_features:
                yield path


class GatheredStep:
    """One forward pass whose rows are all alike to Python: who applies what is in `rows` alone.

    The plan of decode steps on a GPU, where `lora.LoraPlan` is that of all others.
    """

    def __init__(self, slots: GatheredSlots, rows: Rows, num_layers: int) -> None:
        self._slots = slots
        self._rows = rows
        self._num_layers = num_layers
        self._shrunk: tuple[SharedInput, Tensor, Tensor] | None = None

    def apply(
        self, name: str, layer_idx: int, output: Tensor, x: Tensor, module: nn.Module
    ) -> None:
        """Change a target module's output `[num_rows, out_features]` in place.

        x: its own input, `[..., in_features]`; of an embedding token ids `[...]`. Raises ModelError
        for a module that does not see every row.
        """
        num_rows = len(self._rows.slots)
        if len(output) != num_rows:
            raise ModelError(
                f"{name} was called with {len(output)} rows in a step of {num_rows}: "
                "a module that does not see every token cannot carry a per-token adapter"
            )
        stacked = self._slots.find(name)
        if stacked is None or stacked.up is None:
            return  # only a slot beside the stacks targets it, and no row of this step has that
        # The embedding goes with the first layer; the head is reached at full depth alone.
        layer = min(max(layer_idx, 0), self._num_layers - 1)
        kernel = self._slots.kernel
        if stacked.target.kind == "embedding":
            own = self._rows.slots.clamp(min=0).long()
            columns = stacked.group.down.lora_A[0][own, :, x.reshape(-1)]
            low_rank = columns.float().contiguous().unsqueeze(0)
        else:
            low_rank = self._shrink(stacked.group, x, layer)[stacked.index]
        bias = getattr(module, "bias", None)
        kernel.expand(output, low_rank, stacked.up, self._rows, layer, bias)

    def _shrink(self, group: SharedInput, x: Tensor, layer_idx: int) -> Tensor:
        """One product for neighbours that are given the very same tensor, one after the other."""
        if self._shrunk is not None:
            known, given, low_rank = self._shrunk
            if known is group and given is x:
                return low_rank
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        low_rank = self._slots.kernel.shrink(rows, group.down, self._rows, layer_idx)
        self._shrunk = group, x, low_rank
        return low_rank
