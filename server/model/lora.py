"""LoRA deltas of many adapters, each row down to its own depth: the formula, and which rows take it.

For a row with adapter `a` and depth `d`, a target module of layer `l < d` computes

    y = W x + bias + scaling_a * (B_a (A_a x) + bias_a)                          LoRA
    y = (g_a - 1) * (W x) + W x + bias + g_a * scaling_a * (...)                 DoRA, g = m / ||W + sBA||

and the base model's `W x + bias` for `l >= d`: LoRA depth is the ordinary formula whose scaling is
zero past the depth. The runner sorts a step's rows by slot and falling depth, so the rows of one
adapter that reach a layer are one slice and no index is gathered (*grouped*). On a CPU a compiled kernel
does all slices of a module at once (`native`). `apply_per_row` is the same thing as plainly as it can be
said; tests hold the three against each other.

`hooks` puts it on the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from server.errors import ModelError
from server.model.batch import BatchedSequence
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
            raise sees_others(name, num_rows, expected)
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
        ends = {depth for _, depth, _, _ in rows}
        for layer_idx in range(min(max_depth, num_layers)):
            # Where no row's depth ends, a layer sees the rows of the layer below: share them.
            is_shared = layer_idx > 0 and layer_idx not in ends
            segments.append(segments[-1] if is_shared else _merge(rows, layer_idx))
        return cls(
            num_rows=row,
            max_depth=max_depth,
            segments=segments,
            num_head_rows=head_row,
            head_segments=_merge(head_rows, num_layers - 1),
            embedding_segments=segments[0],
        )


def sees_others(name: str, num_rows: int, expected: int) -> ModelError:
    """Of a module that was not called with a step's own rows."""
    return ModelError(
        f"{name} was called with {num_rows} rows in a step of {expected}: "
        "a module that does not see every token cannot carry a per-token adapter"
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
