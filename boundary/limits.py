"""LoRA modules that are held back: inside a block, all their adapters, or some, do not apply.

A module that is held back runs the layer that it wraps, by PEFT's own switch and around that one
call only. So nothing of its LoRA is launched, whatever it is (DoRA, biases of lora_B), and what else
PEFT does to its switches meanwhile, such as `disable_adapter` for a reference model, undoes nothing
and is not undone. Called by `depth`.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

BASE = "__base__"
"""What PEFT's `adapter_names` calls no adapter."""


@contextmanager
def held_back(modules: Iterable[tuple[LoraLayer, Collection[str] | None]]) -> Iterator[None]:
    """Inside the block these modules go without these adapters; None: without any.

    Blocks add up, and may end in any order.
    """
    held: list[tuple[_HeldBack, _Limit]] = []
    try:
        for module, adapters in modules:
            limit = _Limit(adapters)
            stand_in = _stand_in(module) or _HeldBack(module)
            stand_in.limits.append(limit)
            held.append((stand_in, limit))
        yield
    finally:
        for stand_in, limit in held:
            stand_in.remove(limit)


def is_held_back(module: LoraLayer) -> bool:
    """Whether some block holds this module back."""
    return _stand_in(module) is not None


class _Limit:
    """One block's say; told from another block's by identity."""

    def __init__(self, adapters: Collection[str] | None) -> None:
        self.adapters = adapters

    def allows(self, adapter: str) -> bool:
        return self.adapters is not None and adapter not in self.adapters


class _HeldBack:
    """Stands in for a module's `forward` as long as a block holds it back."""

    def __init__(self, module: LoraLayer) -> None:
        assert isinstance(module, nn.Module)  # LoraLayer is a mixin
        self.limits: list[_Limit] = []
        self._module: Any = module
        self._before = vars(module).get("forward")
        self._forward = module.forward
        vars(module)["forward"] = self

    def remove(self, limit: _Limit) -> None:
        self.limits.remove(limit)
        if self.limits:
            return
        if self._before is None:
            del vars(self._module)["forward"]
        else:
            vars(self._module)["forward"] = self._before

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")  # PEFT's mixed batches: one a row
        wanted = self._module.active_adapters if names is None else names
        allowed = [adapter for adapter in wanted if self._allows(adapter)]
        if not any(adapter != BASE for adapter in allowed):
            return self._switched("_disable_adapters", True, x, *args, **kwargs)
        if names is not None:
            kept = [name if self._allows(name) else BASE for name in names]
            output: Tensor = self._forward(x, *args, **kwargs | {"adapter_names": kept})
            return output
        return self._switched("_active_adapter", allowed, x, *args, **kwargs)

    def _allows(self, adapter: str) -> bool:
        return all(limit.allows(adapter) for limit in self.limits)

    def _switched(self, switch: str, value: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # PEFT's own setters would also set requires_grad, and could not put it back.
        before = getattr(self._module, switch)
        setattr(self._module, switch, value)
        try:
            output: Tensor = self._forward(x, *args, **kwargs)
            return output
        finally:
            setattr(self._module, switch, before)


def _stand_in(module: LoraLayer) -> _HeldBack | None:
    found = vars(module).get("forward")
    return found if isinstance(found, _HeldBack) else None
