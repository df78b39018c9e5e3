"""A build's files as models in memory, in float32: for fine-tuning and measuring, not for
serving.
"""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from server.demo import adapters, model_path


def load_base(data: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base model, widened from its stored bfloat16, and its tokenizer."""
    base = LlamaForCausalLM.from_pretrained(
        model_path(data), dtype=torch.float32, use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path(data), trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return base, tokenizer


def load_adapted(name: str, data: Path) -> tuple[PeftModel, PreTrainedTokenizerFast]:
    """The base model with one adapter on it; raises KeyError if the build has no such adapter."""
    base, tokenizer = load_base(data)
    return PeftModel.from_pretrained(base, str(adapters(data)[name])), tokenizer
