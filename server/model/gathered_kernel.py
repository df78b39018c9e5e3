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
class UpProjection:
    """`lora_B` of one module, and what goes with it."""

    lora_B: Tensor
    """`[num_slots, out_features, rank]`, zero past each adapter's own rank."""
    ranks: Tensor
    """int32 `[num_slots]`: the module's row of `DownProjections.ranks`."""
    scaling: Tensor
    """float32 `[num_slots]`"""
    bias: Tensor | None
    """`[num_slots, out_features]`, `lora_B`'s own; None where no slot has one."""
    gain: Tensor | None
    """`[num_slots, out_features]`, 1 for a slot without DoRA; None where no slot has it."""


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
        up: UpProjection,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        """Change `output` `[num_rows, out_features]` in place, as the formula at the head says.

        low_rank: float32 `[num_splits, num_rows, rank]`, one module of what `shrink` returned.
        base_bias: `[out_features]`, the base module's; read only where `up` has gains.
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
        up: UpProjection,
        rows: Rows,
        layer_idx: int,
        base_bias: Tensor | None,
    ) -> None:
        """See `GatheredKernel.expand`."""
        own = rows.slots.clamp(min=0)
        is_changed = (
            (rows.slots >= 0) & (rows.depths > layer_idx) & (up.ranks.index_select(0, own) > 0)
        )
        # The low rank passes through the weights' dtype, as it does in PEFT.
        low_rank = low_rank.sum(0).to(up.lora_B.dtype).float()
        delta = torch.einsum("tor,tr->to", up.lora_B.index_select(0, own).float(), low_rank)
        if up.bias is not None:
            delta = delta + up.bias.index_select(0, own).float()
        y = output.float() + delta * up.scaling.index_select(0, own).unsqueeze(1)
        if up.gain is not None:
            bias = 0.0 if base_bias is None else base_bias.float()
            y = bias + up.gain.index_select(0, own).float() * (y - bias)
        output.copy_(torch.where(is_changed.unsqueeze(1), y.to(output.dtype), output))
