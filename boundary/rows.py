"""LoRA by row: in one forward pass, some rows of the batch apply an adapter and others do not.

`LoraRows` is what the sweep asks for, so that whoever applies LoRA in another way than PEFT, such as
a server with hooks of its own, can lend it to the sweep. `PeftLoraRows` is PEFT's: rows that apply
LoRA go through PEFT's own forward and the others through the layer that it wraps, which is exact for
whatever that forward does (rsLoRA, DoRA, biases of lora_B).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from boundary.depth import lora_modules


class LoraRows(Protocol):
    """Applies one adapter to the first rows of a batch, a number that differs from layer to layer."""

    @property
    def layers(self) -> frozenset[int]:
        """The layers that have LoRA: in the others, rows with and without are the same.

        LoRA of the embedding counts as the first layer's, LoRA of the output head as the last's.
        """

    def __enter__(self) -> object:
        """From here to `__exit__`, modules do as `reach` says."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the model as it was."""

    def reach(self, layer_idx: int, num_lora_rows: int, num_rows: int) -> None:
        """Say, before layer `layer_idx` runs, that its first `num_lora_rows` of `num_rows` apply LoRA."""

    def observe(self, callback: "ObserveLora | None") -> None:
        """From here to `__exit__`, call this with what each module's LoRA adds; None ends it."""


ObserveLora = Callable[[int, Tensor], None]
"""Called once a module with its `layer_idx` and what LoRA added to the output of the rows that apply
it, `[..., out_features]`; not at all where no row does."""


@contextmanager
def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, `module` runs `forward` in place of its own; its hooks run as ever."""
    attributes = vars(module)
    before = attributes.get("forward")  # the class's own unless somebody else stands in already
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


class PeftLoraRows:
    """`LoraRows` of a PEFT model's active adapter.

    Raises ValueError for what cannot be split by rows: what no depth can switch, LoRA on routed
    experts or on bare parameters, and variants other than DoRA.
    """

    def __init__(self, model: PeftModel) -> None:
        modules = lora_modules(model)
        for name, module, _ in modules:
            _refuse_unsplittable(name, module)
        self._modules = modules
        self._rows: dict[int, tuple[int, int]] = {}
        self._callback: ObserveLora | None = None
        self._stack = ExitStack()

    @property
    def layers(self) -> frozenset[int]:
        """The layers that have LoRA."""
        return frozenset(layer_idx for _, _, layer_idx in self._modules)

    def __enter__(self) -> "PeftLoraRows":
        with ExitStack() as stack:
            for name, module, layer_idx in self._modules:
                assert isinstance(module, nn.Module)  # LoraLayer is a mixin
                forward = self._split(name, module, module.forward, layer_idx)
                stack.enter_context(stand_in(module, forward))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._rows.clear()
        self._callback = None

    def reach(self, layer_idx: int, num_lora_rows: int, num_rows: int) -> None:
        """Say how many rows of this layer apply LoRA."""
        self._rows[layer_idx] = (num_lora_rows, num_rows)

    def observe(self, callback: ObserveLora | None) -> None:
        """Call this with what LoRA adds, at the cost of running those rows without it too."""
        self._callback = callback

    def _split(
        self, name: str, module: LoraLayer, with_lora: Callable[..., Tensor], layer_idx: int
    ) -> Callable[..., Tensor]:
        without = module.get_base_layer()

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            num_lora_rows, num_rows = self._rows[layer_idx]
            # Layers of experts flatten [num_rows, num_tokens, ...] to [num_rows * num_tokens, ...].
            num_flat, rest = divmod(x.shape[0], num_rows)
            if rest:
                raise ValueError(f"{name} got {x.shape[0]} rows, no multiple of {num_rows}")
            end = num_lora_rows * num_flat
            if end == 0:
                output: Tensor = without(x, *args, **kwargs)
                return output
            applied = with_lora(x[:end], *args, **kwargs)
            if self._callback is not None:
                self._callback(layer_idx, applied - without(x[:end], *args, **kwargs))
            if end == x.shape[0]:
                return applied
            return torch.cat((applied, without(x[end:], *args, **kwargs)))

        return forward


def rows_of(model: nn.Module, rows: LoraRows | None) -> LoraRows:
    """The rows given, or PEFT's own. Raises TypeError for a plain model without rows."""
    if rows is not None:
        return rows
    if not isinstance(model, PeftModel):
        raise TypeError("a model without PEFT needs rows, which say how LoRA is applied to it")
    return PeftLoraRows(model)


def _refuse_unsplittable(name: str, module: LoraLayer) -> None:
    if "experts" in name.split("."):
        raise ValueError(f"LoRA on {name} sees only the tokens routed to it, which are not rows")
    if hasattr(module, "parameter_name"):
        raise ValueError(f"LoRA on {name} changes a parameter for all rows at once")
    for adapter in module.active_adapters:
        variant = type(module.lora_variant.get(adapter)).__name__
        if variant != "NoneType" and not variant.startswith("Dora"):
            raise ValueError(f"LoRA on {name} is a {variant}, which is not known to go by rows")
