"""Adapters' weights where the gathered kernel reads them, and a step that applies them row by row.

Every slot's weights for one module lie side by side in one stack, so that a step needs no more than
each row's slot and depth to know what to add: the tensors' addresses stay what they are while
adapters come and go, which is what lets a recorded step (`graphs`) run again with others. Modules that
share an input (q, k and v; gate and up) share a stack of `lora_A` and one of `lora_B`, and are shrunk in
one launch; where their outputs are columns of one product (`products`), they are expanded in one, too.

A stack is as wide as its widest adapter, rounded up to one of `RANKS`; the rest is zeros. It grows when
a wider one comes, which moves it: `signature` then differs, and what was recorded is void.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from server.errors import ModelError
from server.model.gathered_kernel import (
    DownProjections,
    GatheredKernel,
    Part,
    Rows,
    TorchKernel,
    UpProjections,
)
from server.model.products import ProductLinear, shared_product
from server.model.replay.tape import Call, noted_call

if TYPE_CHECKING:
    from server.model.lora import LoraWeights
    from server.model.targets import Target

RANKS = (8, 16, 32, 64, 128, 256)
"""Widths of stacks; above the last, multiples of it."""
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that may be given one input, where they are no product, which says it. Whether
they are is seen at every call."""


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


@dataclass(frozen=True, slots=True)
class Shrink:
    """`GatheredKernel.shrink` as one call of a tape."""

    kernel: GatheredKernel
    down: DownProjections
    rows: Rows
    layer_idx: int

    def __call__(self, x: Tensor) -> Tensor:
        """The low ranks of x."""
        return self.kernel.shrink(x, self.down, self.rows, self.layer_idx)


@dataclass(frozen=True, slots=True)
class Expand:
    """`GatheredKernel.expand` as one call of a tape."""

    kernel: GatheredKernel
    up: UpProjections
    rows: Rows
    layer_idx: int
    base_bias: Tensor | None

    def __call__(self, output: Tensor, low_rank: Tensor) -> Tensor:
        """`output`, changed in place."""
        self.kernel.expand(output, low_rank, self.up, self.rows, self.layer_idx, self.base_bias)
        return output


@dataclass(frozen=True, slots=True)
class Delta:
    """`GatheredKernel.delta` as one call of a tape."""

    kernel: GatheredKernel
    up: UpProjections
    rows: Rows
    layer_idx: int
    out_features: int

    def __call__(self, low_rank: Tensor) -> Tensor:
        """What is added to the output."""
        return self.kernel.delta(low_rank, self.up, self.rows, self.layer_idx, self.out_features)


def is_beside(call: Call) -> bool:
    """Whether a call needs a module's input and not its output, so it can run beside the base product."""
    return isinstance(call.function, Shrink | Delta)


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
    ) -> Tensor | None:
        """What stands in the place of a target module's output `[..., out_features]`; None: it was changed.

        x: its own input, `[..., in_features]`; of an embedding token ids `[...]`. Raises ModelError
        for a module that does not see every row.
        """
        num_rows = len(self._rows.slots)
        own = output.view(-1, output.shape[-1])
        if len(own) != num_rows:
            raise ModelError(
                f"{name} was called with {len(own)} rows in a step of {num_rows}: "
                "a module that does not see every token cannot carry a per-token adapter"
            )
        stacked = self._slots.find(name)
        if stacked is None or stacked.up is None:
            return (
                None  # only a slot beside the stacks targets it, and no row of this step has that
            )
        # The embedding goes with the first layer; the head is reached at full depth alone.
        layer = min(max(layer_idx, 0), self._num_layers - 1)
        group = stacked.group
        if stacked.target.kind == "embedding":
            slots = self._rows.slots.clamp(min=0).long()
            columns = group.down.lora_A[0][slots, :, x.reshape(-1)]
            low_rank = columns.float().contiguous().view(1, 1, num_rows, -1)
            self._expand(own, low_rank, stacked.up, layer, None)
            return None
        if group.product is None:
            low_rank = self._shrink(group, x, layer)[stacked.index :][:1]
            bias = getattr(module, "bias", None)
            return self._adapted(own, low_rank, stacked.up, layer, bias).view(output.shape)
        assert isinstance(module, ProductLinear)
        if group.product.adapted is None:
            # Whoever comes first does it for all, who take their columns of it.
            low_rank = self._shrink(group, x, layer)
            whole, bias = module.whole(own), group.product.bias
            group.product.adapted = self._adapted(whole, low_rank, group.up, layer, bias)
        columns = group.product.adapted[:, module.first_column :][:, : module.out_features]
        if stacked.index == group.up.parts[-1].module:
            group.product.adapted = None  # nobody after this one asks
        return columns.view(output.shape)

    def _adapted(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjections,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> Tensor:
        """`output` with LoRA in it: itself, or where only something is added to it, a sum.

        What is added does not wait for the output then, and the sum is one with what reads it.
        """
        if up.gain is not None:
            self._expand(output, low_rank, up, layer_idx, base_bias)
            return output
        delta = Delta(self._slots.kernel, up, self._rows, layer_idx, output.shape[1])
        return output + noted_call(delta, low_rank)

    def _expand(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjections,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        expand = Expand(self._slots.kernel, up, self._rows, layer_idx, base_bias)
        noted_call(expand, output, low_rank)

    def _shrink(self, group: SharedInput, x: Tensor, layer_idx: int) -> Tensor:
        """One product for neighbours that are given the very same tensor, one after the other."""
        if self._shrunk is not None:
            known, given, low_rank = self._shrunk
            if known is group and given is x:
                return low_rank
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        shrink = Shrink(self._slots.kernel, group.down, self._rows, layer_idx)
        low_rank = noted_call(shrink, rows)
        self._shrunk = group, x, low_rank
        return low_rank
