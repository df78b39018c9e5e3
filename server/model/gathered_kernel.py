"""The gathered LoRA kernel: its tensors, its two halves, and what they compute said plainly in torch.

For row `t` with slot `s` and depth `d`, and a module of layer `l < d` that slot `s` targets,

    low_rank[t] = A_s x[t]                                                       shrink
    y[t] = b + g_s * ((y[t] - b) + scaling_s * (B_s low_rank[t] + bias_s))       expand

where `b` is the base module's bias and `g_s` DoRA's gain (1 for plain LoRA). Every other row is left as
it is. Which rows those are is read from tensors, never from Python: a step that was recorded once
computes the right thing for whatever the tensors hold when it runs again.

`TorchKernel` is these formulas and nothing else; `triton_lora` computes the same on a GPU. Axis names:
num_rows, num_modules (those that share an input), num_slots, rank (of the stack, zero-padded).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Each row's adapter. A row of the base model has slot -1; its depth does not matter."""

    slots: Tensor
    """int32 `[num_rows]`"""
    depths: Tensor
    """int32 `[num_rows]`"""


@dataclass(frozen=True, slots=True)
class DownProjections:
    """`lora_A` of the modules that share an input, so that one product serves all of them."""

    lora_A: Tensor
    """`[num_modules, num_slots, rank, in_features]`, zero past each adapter's own rank."""
    ranks: Tensor
    """int32 `[num_modules, num_slots]`: 0 where a slot does not target a module."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one module's columns are."""

    module: int
    """Its place in `ranks`, `scaling` and what `shrink` returned."""
    column: int
    """Its first of `lora_B`."""
    width: int
    """How many they are."""
    place: int
    """Its first of the output."""


@dataclass(frozen=True, slots=True)
class UpProjections:
    """`lora_B` of modules whose outputs are columns of one tensor, and what goes with it."""

    lora_B: Tensor
    """`[num_slots, num_columns, rank]`, zero past each adapter's own rank."""
    ranks: Tensor
    """int32 `[num_modules, num_slots]`, those of `DownProjections.ranks`."""
    scaling: Tensor
    """float32 `[num_modules, num_slots]`"""
    bias: Tensor | None
    """`[num_slots, num_columns]`, `lora_B`'s own; None where no slot has one."""
    gain: Tensor | None
    """`[num_slots, num_columns]`, 1 for a slot without DoRA; None where no slot has it."""
    parts: tuple[Part, ...]
    """Of the modules that some slot targets, in the order of their columns."""

    def alone(self, part: Part) -> "UpProjections":
        """A view of one module's, for an output that is its own."""
        columns = slice(part.column, part.column + part.width)
        module = slice(part.module, part.module + 1)
        return UpProjections(
            lora_B=self.lora_B[:, columns],
            ranks=self.ranks[module],
            scaling=self.scaling[module],
            bias=None if self.bias is None else self.bias[:, columns],
            gain=None if self.gain is None else self.gain[:, columns],
            parts=(Part(0, 0, part.width, 0),),
        )


class GatheredKernel(Protocol):
    """Both halves. Neither waits for the device, and shapes alone decide what they launch."""

    name: str

    def shrink(self, x: Tensor, down: DownProjections, rows: Rows, layer_idx: int) -> Tensor:
        """x `[num_rows, in_features]`, rows' last axis contiguous.

        Returns float32 `[num_modules, num_splits, num_rows, rank]`, whose sum over the splits of the
        input is the product; rows that do not apply LoRA may hold anything.
        """

    def expand(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjections,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        """Change the columns of `up`'s parts in `output` `[num_rows, out_features]`, as the head says.

        output: rows' last axis contiguous. low_rank: float32 `[num_modules, num_splits, num_rows, rank]`,
        what `shrink` returned. base_bias: `[out_features]`, contiguous, the base modules'; read only where
        `up` has gains.
        """

    def delta(
        self, low_rank: Tensor, up: UpProjections, rows: Rows, layer_idx: int, out_features: int
    ) -> Tensor:
        """What `expand` adds, by itself: `[num_rows, out_features]` in `up`'s dtype, 0 where it adds nothing.

        For `up` without gains, which do more than add.
        """

    def fetch_of(
        self, down: DownProjections, up: UpProjections, rows: Rows, layer_idx: int
    ) -> Callable[[], None] | None:
        """Asks for the weights that `shrink` and `expand` will read, so that they are in a cache by then.

        It changes nothing and waits for nothing. None where the device has no such thing.
        """


class TorchKernel:
    """The formulas in torch, one row's weights gathered beside the next: slow, and right anywhere."""

    name = "torch"

    def shrink(self, x: Tensor, down: DownProjections, rows: Rows, layer_idx: int) -> Tensor:
        """See `GatheredKernel.shrink`."""
        own = rows.slots.clamp(min=0)
        return torch.stack(
            [
                torch.einsum("trk,tk->tr", lora_A.index_select(0, own).float(), x.float())
                for lora_A in down.lora_A
            ]
        ).unsqueeze(1)

    def expand(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjections,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        """See `GatheredKernel.expand`."""
        for part in up.parts:
            places = slice(part.place, part.place + part.width)
            bias = None if base_bias is None else base_bias[places]
            own = low_rank[part.module]
            self._expand_one(output[:, places], own, up.alone(part), rows, layer_idx, bias)

    def delta(
        self, low_rank: Tensor, up: UpProjections, rows: Rows, layer_idx: int, out_features: int
    ) -> Tensor:
        """See `GatheredKernel.delta`."""
        delta = up.lora_B.new_zeros((low_rank.shape[2], out_features))
        self.expand(delta, low_rank, up, rows, layer_idx, None)
        return delta

    def fetch_of(
        self, down: DownProjections, up: UpProjections, rows: Rows, layer_idx: int
    ) -> Callable[[], None] | None:
        """See `GatheredKernel.fetch_of`: nothing."""
        return None

    def _expand_one(
        self,
        output: Tensor,
        low_rank: Tensor,
        up: UpProjections,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        own = rows.slots.clamp(min=0)
        is_changed = (
            (rows.slots >= 0) & (rows.depths > layer_idx) & (up.ranks[0].index_select(0, own) > 0)
        )
        # The low rank passes through the weights' dtype, as it does in PEFT.
        low_rank = low_rank.sum(0).to(up.lora_B.dtype).float()
        delta = torch.einsum("tor,tr->to", up.lora_B.index_select(0, own).float(), low_rank)
        if up.bias is not None:
            delta = delta + up.bias.index_select(0, own).float()
        y = output.float() + delta * up.scaling[0].index_select(0, own).unsqueeze(1)
        if up.gain is not None:
            bias = 0.0 if base_bias is None else base_bias.float()
            y = bias + up.gain.index_select(0, own).float() * (y - bias)
        output.copy_(torch.where(is_changed.unsqueeze(1), y.to(output.dtype), output))
