"""The forward hooks: LoRA deltas of many adapters, each row down to its own depth.

For a row with adapter `a` and depth `d`, a target module of layer `l < d` computes

    y = W x + bias + scaling_a * (B_a (A_a x) + bias_a)                          LoRA
    y = (g_a - 1) * (W x) + W x + bias + g_a * scaling_a * (...)                 DoRA, g = m / ||W + sBA||

and the base model's `W x + bias` for `l >= d`: LoRA depth is the ordinary formula whose scaling is
zero past the depth. The runner sorts a step's rows by slot and falling depth, so the rows of one
adapter that reach a layer are one slice and no index is gathered (*grouped*). On a CPU a compiled kernel
does all slices of a module at once (`native`). `apply_per_row` is the same thing as plainly as it can be
said; tests hold the three against each other.

Hooks exist only on modules of layers that some row of the step reaches: a base-only step runs on a
model without hooks.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from server.errors import ModelError
from server.model import context
from server.model.batch import BatchedSequence
from server.model.gathered import GatheredSlots, GatheredStep
from server.model.grouped_mm import GroupedProducts
from server.model.native.library import DTYPES, load
from server.model.native.lora import NativeLora, Part, Scratch
from server.model.packed import PackedLinear, Product
from server.model.segments import ReachedRows, Segment


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter's weights for one module, on the device, in the model's dtype."""

    lora_A: Tensor
    """`[rank, in_features]`; of an embedding `[rank, num_embeddings]`."""
    lora_B: Tensor
    """`[out_features, rank]`; its transpose is contiguous where a checkpoint was read."""
    scaling: float
    bias: Tensor | None = None
    """`[out_features]`, `lora_B`'s own."""
    gain: Tensor | None = None
    """DoRA's `g`, `[out_features]`."""


class LoraPlan(Protocol):
    """Which rows of one forward pass apply which adapter: what every hook asks."""

    def reached(self, name: str, layer_idx: int, num_rows: int) -> ReachedRows:
        """The rows of a module's `num_rows` that apply LoRA.

        `layer_idx` is -1 for the input embedding and `num_layers` for `lm_head`. Raises ModelError,
        with the module's `name`, for a number of rows that is not this pass's.
        """

    def added(self, layer_idx: int, before: Tensor, after: Tensor) -> None:
        """What the hook did to the rows it was told to change, if `is_observed`."""

    @property
    def is_observed(self) -> bool:
        """Whether `added` wants to be called; it costs a copy of each output."""


@dataclass(frozen=True, slots=True)
class LoraStep:
    """The plan of an engine step."""

    num_rows: int
    max_depth: int
    """The largest depth of the step: layers at or above it do no LoRA work at all."""
    segments: list[ReachedRows]
    """For each layer below `max_depth`, the rows that reach it."""
    num_head_rows: int
    head_segments: ReachedRows
    """Rows of `lm_head`, which sees only the rows whose logits are wanted."""
    embedding_segments: ReachedRows = field(default_factory=ReachedRows)

    is_observed: bool = False

    def reached(self, name: str, layer_idx: int, num_rows: int) -> ReachedRows:
        """See `LoraPlan`."""
        if layer_idx < 0:
            segments, expected = self.embedding_segments, self.num_rows
        elif layer_idx < len(self.segments):
            segments, expected = self.segments[layer_idx], self.num_rows
        else:  # hooks are installed up to `max_depth` only: above the layers lies `lm_head`
            segments, expected = self.head_segments, self.num_head_rows
        if num_rows != expected:
            raise ModelError(
                f"{name} was called with {num_rows} rows in a step of {expected}: "
                "a module that does not see every token cannot carry a per-token adapter"
            )
        return segments

    def added(self, layer_idx: int, before: Tensor, after: Tensor) -> None:
        """Nobody observes an engine step."""

    @classmethod
    def build(cls, batch: list[BatchedSequence], num_layers: int) -> "LoraStep | None":
        """None when every row is the base model. `batch` in the runner's order."""
        max_depth = max((sequence.depth for sequence in batch), default=0)
        if max_depth == 0:
            return None
        rows: list[tuple[int, int, int, int]] = []  # slot, depth, start, end
        head_rows: list[tuple[int, int, int, int]] = []
        row = head_row = 0
        for sequence in batch:
            end, head_end = row + len(sequence.token_ids), head_row + sequence.num_logits
            rows.append((sequence.slot, sequence.depth, row, end))
            head_rows.append((sequence.slot, sequence.depth, head_row, head_end))
            row, head_row = end, head_end
        segments: list[ReachedRows] = []
        for layer_idx in range(min(max_depth, num_layers)):
            reached = _merge(rows, layer_idx)
            # Most layers see the rows of the layer below: share the list.
            segments.append(segments[-1] if segments and segments[-1] == reached else reached)
        return cls(
            num_rows=row,
            max_depth=max_depth,
            segments=segments,
            num_head_rows=head_row,
            head_segments=_merge(head_rows, num_layers - 1),
            embedding_segments=segments[0],
        )


def _merge(rows: list[tuple[int, int, int, int]], layer_idx: int) -> ReachedRows:
    merged: list[Segment] = []
    for slot, depth, start, end in rows:
        if depth <= layer_idx or start == end:
            continue
        if merged and merged[-1].slot == slot and merged[-1].end == start:
            merged[-1] = Segment(slot, merged[-1].start, end)
        else:
            merged.append(Segment(slot, start, end))
    return ReachedRows(merged)


def apply_grouped(
    output: Tensor,
    x: Tensor,
    segments: Iterable[Segment],
    weights: dict[int, LoraWeights],
    base_bias: Tensor | None,
) -> None:
    """Add each segment's delta to `output` in place.

    output `[num_rows, out_features]`: the base module's result. x `[num_rows, in_features]`.
    weights: by slot; a slot that is missing does not target this module. base_bias: the module's own.
    """
    for segment in segments:
        lora = weights.get(segment.slot)
        if lora is None:
            continue
        y = output[segment.start : segment.end]
        low_rank = torch.mm(x[segment.start : segment.end], lora.lora_A.t())
        if lora.gain is not None:
            _rescale(y, lora.gain, base_bias)
            delta = torch.mm(low_rank, lora.lora_B.t())
            if lora.bias is not None:
                delta += lora.bias
            y.addcmul_(delta, lora.gain, value=lora.scaling)
            continue
        y.addmm_(low_rank, lora.lora_B.t(), alpha=lora.scaling)
        if lora.bias is not None:
            y.add_(lora.bias, alpha=lora.scaling)


def _rescale(y: Tensor, gain: Tensor, base_bias: Tensor | None) -> None:
    """`g * (W x) + bias` from `W x + bias`, in place."""
    if base_bias is None:
        y.mul_(gain)
    else:
        y.sub_(base_bias).mul_(gain).add_(base_bias)


def apply_embedding(
    output: Tensor, token_ids: Tensor, segments: Iterable[Segment], weights: dict[int, LoraWeights],
    embed_scale: float,
) -> None:  # fmt: skip
    """The same for an embedding: `A x` is a column of A. token_ids int64 `[num_rows]`."""
    for segment in segments:
        lora = weights.get(segment.slot)
        if lora is None:
            continue
        columns = lora.lora_A.t().index_select(0, token_ids[segment.start : segment.end])
        y = output[segment.start : segment.end]
        y.addmm_(columns, lora.lora_B.t(), alpha=lora.scaling * embed_scale)


def apply_per_row(
    output: Tensor,
    x: Tensor,
    slots: list[int],
    depths: list[int],
    layer_idx: int,
    weights: dict[int, LoraWeights],
    base_bias: Tensor | None,
) -> Tensor:
    """The formula of this file's head, one row at a time: what `apply_grouped` must equal.

    slots, depths: one a row. Returns `[num_rows, out_features]`; nothing is changed in place.
    """
    rows = []
    for y, row, slot, depth in zip(output, x, slots, depths, strict=True):
        lora = weights.get(slot)
        if lora is None or depth <= layer_idx:
            rows.append(y)
            continue
        delta = lora.lora_B @ (lora.lora_A @ row)
        if lora.bias is not None:
            delta = delta + lora.bias
        delta = delta * lora.scaling
        if lora.gain is not None:
            without_bias = y if base_bias is None else y - base_bias
            rows.append(y + (lora.gain - 1) * without_bias + lora.gain * delta)
        else:
            rows.append(y + delta)
    return torch.stack(rows) if rows else output


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
    def product(self) -> Product | None:
        """What its output is part of, if other modules read the same input."""
        module = self.module
        return (
            module.product
            if isinstance(module, PackedLinear) and module.product.is_shared
            else None
        )

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
        self._num_layers = num_layers
        self._gathered = gathered
        self._products = products
        self._modules: dict[str, HookedModule] = {}
        self._installed_depth = 0
        self._scratch = Scratch()

    @property
    def num_installed(self) -> int:
        """Hooks on the model right now."""
        return sum(hooked.handle is not None for hooked in self._modules.values())

    @property
    def num_kernel_calls(self) -> int:
        """Calls of the compiled kernel so far, which torch's dispatcher does not see."""
        return self._scratch.num_calls

    def load(self, slot: int, weights: dict[str, tuple[nn.Module, int, LoraWeights]]) -> None:
        """Fill a slot. weights: module name -> (module, layer_idx, weights)."""
        for name, (module, layer_idx, lora) in weights.items():
            hooked = self._modules.setdefault(name, HookedModule(name, module, layer_idx))
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

    def install(self, depth: int) -> None:
        """Hooks on every targeted module that a step of this largest depth reaches, on no other."""
        self._scratch.num_threads = torch.get_num_threads()
        if depth != self._installed_depth:
            self._installed_depth = depth
            self._refresh()

    def _refresh(self) -> None:
        for hooked in self._modules.values():
            wanted = bool(hooked.weights) and self._is_reached(hooked.layer_idx)
            if wanted and hooked.handle is None:
                hooked.handle = hooked.module.register_forward_hook(
                    _Hook(hooked, self._scratch, self._products)
                )
            elif not wanted and hooked.handle is not None:
                hooked.handle.remove()
                hooked.handle = None

    def _is_reached(self, layer_idx: int) -> bool:
        if layer_idx >= self._num_layers:  # lm_head
            return self._installed_depth >= self._num_layers
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


class _Hook:
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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        current = context.find()
        plan = current.lora if current is not None else None
        if plan is None:
            return  # somebody else's forward pass over the model: the base, untouched
        hooked, product = self._hooked, self._product
        if isinstance(plan, GatheredStep):
            y = output.view(-1, output.shape[-1])
            plan.apply(hooked.name, hooked.layer_idx, y, args[0], module)
            return
        first, end = hooked.part, hooked.part + 1
        if product is not None and hooked.native is not None and not plan.is_observed:
            # Whoever comes first adapts for those after it, which find their columns as they should be.
            end = hooked.native.num_parts if product.adapted_from is None else product.adapted_from
            if first >= end:
                return
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
