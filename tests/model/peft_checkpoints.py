"""Tiny random base models and checkpoints that PEFT itself writes for them. Knows no test."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from server.model.targets import Targets

NUM_LAYERS = 3

_COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "tied_llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_head": 2, "n_layer": NUM_LAYERS}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": NUM_LAYERS}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": NUM_LAYERS, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
}


def build_base(name: str) -> PreTrainedModel:
    """A fresh model, float32, the same weights every time."""
    config_class, fields = _CONFIGS[name]
    config = getattr(transformers, config_class)(**(_COMMON | fields))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    model.train(False)
    return model


@cache
def targets_of(name: str) -> Targets:
    return Targets(build_base(name))


def save_adapter(base: str, directory: Path, *, seed: int = 1, **fields: Any) -> PeftModel:
    """Write an adapter with every LoRA parameter drawn at random; return PEFT's own model of it."""
    wanted: dict[str, Any] = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | fields
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # PEFT remarks on resized, tied and bias-less layers
        torch.manual_seed(seed)
        model = get_peft_model(build_base(base), LoraConfig(**wanted))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                elif "lora_" in name:
                    parameter.normal_(std=0.5)
        model.save_pretrained(str(directory))
    return model.eval()


def peft_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's own LoRA layers by the base model's names."""
    base = model.get_base_model()
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
