"""Random PEFT adapters for the zoo, in every variant that must be served, saved as safetensors.

`lora_B` is drawn instead of left at zero, strong enough that each layer's delta moves the logits.
Written by PEFT itself, so that the files are what users have. Knows nothing of Fathom.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.parity.zoo import Architecture, build_model, seeded

RANK = 4
ALPHA = 8


def _plain(_: Architecture, __: list[str]) -> dict[str, Any]:
    return {}


def _rslora(_: Architecture, __: list[str]) -> dict[str, Any]:
    return {"use_rslora": True}


def _dora(_: Architecture, __: list[str]) -> dict[str, Any]:
    return {"use_dora": True}


def _patterns(architecture: Architecture, modules: list[str]) -> dict[str, Any]:
    # A bare suffix, one module's whole path, and a regular expression over layers.
    first, second, *_ = architecture.targets
    whole_path = next(name for name in modules if name.endswith(second) and ".2." in name)
    return {
        "rank_pattern": {first: 2, re.escape(whole_path): 6},
        "alpha_pattern": {second: 3, rf"^.*\.[13]\..*{first}": 12},
    }


def _lora_bias(_: Architecture, __: list[str]) -> dict[str, Any]:
    return {"lora_bias": True}


def _some_layers(_: Architecture, __: list[str]) -> dict[str, Any]:
    return {"layers_to_transform": [0, 2]}


def _lm_head(architecture: Architecture, _: list[str]) -> dict[str, Any]:
    return {"target_modules": [*architecture.targets[:2], "lm_head"]}


def _lm_head_and_low_layers(architecture: Architecture, _: list[str]) -> dict[str, Any]:
    # Its deepest layer is 1, yet depths 2 and full are different models.
    return {"target_modules": rf".*(\.[01]\..*{architecture.targets[0]}|lm_head)"}


def _embedding(architecture: Architecture, _: list[str]) -> dict[str, Any]:
    return {"target_modules": [*architecture.targets[:2], "embed_tokens"]}


Variant = Callable[[Architecture, list[str]], dict[str, Any]]

VARIANTS: dict[str, Variant] = {
    "plain": _plain,
    "rslora": _rslora,
    "dora": _dora,
    "patterns": _patterns,
}
"""What every architecture is tried with."""

EXTRA_VARIANTS: dict[str, Variant] = {
    "lora_bias": _lora_bias,
    "some_layers": _some_layers,
    "lm_head": _lm_head,
    "lm_head_and_low_layers": _lm_head_and_low_layers,
    "embedding": _embedding,
}
"""What only Llama is tried with: nothing in them depends on the architecture."""


@contextmanager
def expected_peft_warnings() -> Iterator[None]:
    """Let through what PEFT 0.21 says of adapters that are meant to be as they are."""
    with warnings.catch_warnings():
        for message in (
            # PeftModel reads a property that transformers 5.2x renamed.
            "`is_gradient_checkpointing` is deprecated",
            # Llama's projections have no bias: the adapter only cannot be merged.
            "`lora_bias=True` was passed but the targeted layer of type Linear has no bias",
            # Nor could one be merged into torchao's weights without what made them.
            "TorchaoLoraLinear was instantiated without `get_apply_tensor_subclass`",
            # The bias of lora_B is rightly one-dimensional.
            r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape: .*lora_B\.bias",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def spread_adapter(model: nn.Module) -> None:
    """Draw every LoRA parameter; DoRA's magnitudes are scaled away from the weights' norms."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_embedding_" in name:
                parameter.normal_(std=0.3)
            elif "lora_A" in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "lora_B" in name:  # and its bias
                parameter.normal_(std=0.15)


def save_adapter(
    architecture: Architecture, variant: str, directory: Path, *, seed: int = 0, rank: int = RANK
) -> Path:
    """Write one adapter for the zoo's model of `architecture` into `directory` and return it."""
    base = build_model(architecture)
    modules = [
        name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    fields = {
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": list(architecture.targets),
        "fan_in_fan_out": architecture.fan_in_fan_out,
        "task_type": "CAUSAL_LM",
    } | (VARIANTS | EXTRA_VARIANTS)[variant](architecture, modules)
    with seeded(seed + 1), expected_peft_warnings():
        model = get_peft_model(base, LoraConfig(**fields))
        spread_adapter(model)
        model.save_pretrained(directory, save_embedding_layers=False)
    return directory
