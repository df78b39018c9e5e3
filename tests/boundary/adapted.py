"""What tests of sweeps and calibrations share: adapted models, samples, and what must not remain."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from boundary.rows import ObserveLora
from tests.parity.adapters import expected_peft_warnings, save_adapter
from tests.parity.zoo import NUM_LAYERS, Architecture, build_model, random_prompt


@dataclass(frozen=True)
class Sample:
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]


def samples_of(*lengths: tuple[int, int]) -> list[Sample]:
    return [
        Sample(random_prompt(prompt, seed=seed), random_prompt(completion, seed=seed + 100))
        for seed, (prompt, completion) in enumerate(lengths)
    ]


def adapted(architecture: Architecture, variant: str, directory: Path) -> PeftModel:
    save_adapter(architecture, variant, directory)
    with expected_peft_warnings():
        return PeftModel.from_pretrained(build_model(architecture), directory).eval()


def traces(model: nn.Module) -> list[str]:
    """What a sweep could leave behind: hooks, forwards that stand in, switches."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or (isinstance(module, LoraLayer) and module.disable_adapters)
    ]


class Untouched:
    """Holds a model to what it is now: its logits to the last bit, its hooks, torch's modes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._logits = self._run()

    def check(self) -> None:
        assert traces(self._model) == []
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert torch.equal(self._run(), self._logits)

    def _run(self) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=torch.arange(7).view(1, 7)).logits
        return logits


class HookedRows:
    """Another way to apply LoRA: hooks on the plain model, as a server has them."""

    def __init__(self, plain: nn.Module, adapter: PeftModel) -> None:
        self.layers = frozenset(range(NUM_LAYERS))
        self._reach: dict[int, int] = {}
        self._callback: ObserveLora | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._hooks: list[tuple[nn.Module, Callable[..., torch.Tensor]]] = []
        modules = dict(plain.named_modules())
        for name, lora in adapter.get_base_model().named_modules():
            if hasattr(lora, "lora_A"):
                self._hooks.append((modules[name], self._hook(lora, int(name.split(".")[2]))))

    def _hook(self, lora: nn.Module, layer_idx: int) -> Callable[..., torch.Tensor]:
        delta = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        delta *= lora.scaling["default"]

        def hook(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            end = self._reach[layer_idx]
            added = args[0][:end] @ delta.T
            if self._callback is not None:
                self._callback(layer_idx, added)
            return torch.cat([output[:end] + added, output[end:]])

        return hook

    def __enter__(self) -> None:
        self._handles = [module.register_forward_hook(hook) for module, hook in self._hooks]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def reach(self, layer_idx: int, num_lora_rows: int, num_rows: int) -> None:
        self._reach[layer_idx] = num_lora_rows

    def observe(self, callback: ObserveLora | None) -> None:
        self._callback = callback
