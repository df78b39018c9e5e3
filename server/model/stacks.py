"""Adapters' weights where the gathered kernel reads them: one stack for every slot's weights of one module.

They lie side by side, so that a step needs no more than each row's slot and depth to know what to add: the
tensors' addresses stay what they are while adapters come and go, which is what lets a recorded step
(`graphs`) run again with others. Modules that share an input (q, k and v; gate and up) share a stack of
`lora_A` and one of `lora_B`, and are shrunk in one launch; where their outputs are columns of one product
(`products`), they are expanded in one, too.

A stack is as wide as its widest adapter, rounded up to one of `RANKS`; the rest is zeros. It grows when
a wider one comes, which moves it: `num_moves` then differs, and what was recorded is void.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.model.gathered_kernel import DownProjections, Part, UpProjections
from server.model.products import ProductLinear, shared_product

if TYPE_CHECKING:
    from server.model.lora import LoraWeights
    from server.model.targets import Target

RANKS = (8, 16, 32, 64, 128, 256)
"""Widths of stacks; above the last, multiples of it."""


def stack_rank(rank: int) -> int:
    """The width of a stack that holds an adapter of `rank`."""
    widest = RANKS[-1]
    return next((width for width in RANKS if width >= rank), -(-rank // widest) * widest)


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
        self.up: UpProjections | None = None
        """Its own, for an output of its own. None until a slot targets it."""
        # An embedding that scales its output scales what LoRA adds to it, too.
        self.scale = float(getattr(target.module, "embed_scale", 1.0))


class SharedInput:
    """Modules with one input: `lora_A` of all of them in one tensor, `lora_B` in another.

    `lora_B` has columns for the modules that some slot has targeted, and none for the others; it is
    made anew when another one is.
    """

    def __init__(self, targets: list[Target], num_slots: int, like: Tensor) -> None:
        """targets: in the order of their columns, if they are part of one product, which then is shared
        by no others that can carry a LoRA. like: empty, of the model's dtype and device.
        """
        self._num_slots = num_slots
        self._like = like
        self._in_features = targets[0].in_features
        products = {id(p): p for target in targets if (p := shared_product(target.module))}
        self.product = next(iter(products.values())) if len(products) == 1 else None
        """What the outputs of all of them are columns of."""
        self.rank = 0
        self.num_moves = 0
        """How often a tensor has been replaced by another."""
        self.modules = [StackedModule(target, self, index) for index, target in enumerate(targets)]
        ranks = like.new_zeros((len(targets), num_slots), dtype=torch.int32)
        self.down = DownProjections(
            self._zeros(len(targets), num_slots, 0, self._in_features), ranks
        )
        self.up = UpProjections(
            lora_B=self._zeros(num_slots, 0, 0),
            ranks=ranks,
            scaling=torch.zeros_like(ranks, dtype=torch.float32),
            bias=None,
            gain=None,
            parts=(),
        )

    def put(self, index: int, slot: int, lora: LoraWeights) -> bool:
        """Copy a module's weights into a slot; returns whether anything moved."""
        module, rank = self.modules[index], lora.lora_A.shape[0]
        num_moves = self.num_moves
        if rank > self.rank or module.up is None:
            targeted = {index, *(part.module for part in self.up.parts)}
            self._lay_out(max(self.rank, stack_rank(rank)), targeted)
        self._make_room(has_bias=lora.bias is not None, has_gain=lora.gain is not None)
        up = module.up
        assert up is not None
        self.down.lora_A[index, slot].zero_()[:rank].copy_(lora.lora_A)
        up.lora_B[slot].zero_()[:, :rank].copy_(lora.lora_B)
        up.scaling[0, slot] = lora.scaling * module.scale
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

    def _lay_out(self, rank: int, targeted: set[int]) -> None:
        """Stacks of this rank, with columns for these modules, and in them what there is."""
        parts: list[Part] = []
        for module in (self.modules[index] for index in sorted(targeted)):
            column = parts[-1].column + parts[-1].width if parts else 0
            parts.append(Part(module.index, column, module.target.out_features, _place(module)))
        size = (self._num_slots, parts[-1].column + parts[-1].width)
        old, down = self.up, self.down
        if rank > self.rank:
            lora_A = self._zeros(len(self.modules), self._num_slots, rank, self._in_features)
            lora_A[:, :, : self.rank].copy_(down.lora_A)
            down = replace(down, lora_A=lora_A)
        up = replace(
            old,
            lora_B=self._zeros(*size, rank),
            bias=None if old.bias is None else self._zeros(*size),
            gain=None if old.gain is None else self._like.new_ones(size),
            parts=tuple(parts),
        )
        own = {part.module: part for part in parts}
        for part in old.parts:
            new, known = up.alone(own[part.module]), old.alone(part)
            new.lora_B[:, :, : self.rank].copy_(known.lora_B)
            for vectors, those in ((new.bias, known.bias), (new.gain, known.gain)):
                if vectors is not None and those is not None:
                    vectors.copy_(those)
        # Only now, as the device may be out of memory: both are of one rank at any time.
        self.down, self.rank = down, rank
        self._replace(up)

    def _make_room(self, *, has_bias: bool, has_gain: bool) -> None:
        """For the first adapter that has such a vector."""
        up, size = self.up, self.up.lora_B.shape[:2]
        if has_bias and up.bias is None:
            up = replace(up, bias=self._zeros(*size))
        if has_gain and up.gain is None:
            up = replace(up, gain=self._like.new_ones(size))
        if up is not self.up:
            self._replace(up)

    def _replace(self, up: UpProjections) -> None:
        self.up = up
        for part in up.parts:
            self.modules[part.module].up = up.alone(part)
        self.num_moves += 1


def _place(module: StackedModule) -> int:
    own = module.target.module
    return own.first_column if isinstance(own, ProductLinear) else 0
