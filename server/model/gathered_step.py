"""A forward pass that applies adapters row by row out of stacks, as calls for a tape or a graph to record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from server.errors import ModelError
from server.model.gathered_kernel import DownProjections, GatheredKernel, Rows, UpProjections
from server.model.products import ProductLinear
from server.model.replay.tape import Call, noted_call

if TYPE_CHECKING:
    from server.model.gathered import GatheredSlots
    from server.model.stacks import SharedInput


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


def fetch_of(calls: Sequence[Call]) -> Callable[[], None] | None:
    """What asks for the weights of calls that run beside a product; None if that is nothing."""
    shrink = next((call.function for call in calls if isinstance(call.function, Shrink)), None)
    delta = next((call.function for call in calls if isinstance(call.function, Delta)), None)
    if shrink is None or delta is None:
        return None
    return shrink.kernel.fetch_of(shrink.down, delta.up, shrink.rows, shrink.layer_idx)


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
