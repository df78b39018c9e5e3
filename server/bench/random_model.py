"""A random Llama and random adapters as directories, as any user's model is.

Drawn on the device they will run on, because a CPU takes minutes for 8 billion numbers. Adapters are
written from the shapes alone. Both are drawn strong enough that another depth gives other tokens, so
that a check on them can fail.
"""

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from server.bench.shape import ModelShape

_ALPHA_PER_RANK = 2
_LORA_B_STD = 0.02
"""As large as the base weights: a delta is then a fifth to a third of the output it is added to."""


def save_random_model(
    shape: ModelShape, directory: Path, *, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    """Write config, weights (one standard deviation of 0.02) and a tokenizer of one word a token."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            model = LlamaForCausalLM._from_config(  # type: ignore[no-untyped-call]
                llama_config(shape), dtype=dtype
            )
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    save_tokenizer(shape.vocab_size, directory)


def llama_config(shape: ModelShape) -> LlamaConfig:
    """No token ends a sequence: every completion is as long as it was asked to be."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position,
        rope_parameters=dict(shape.rope),
        tie_word_embeddings=shape.is_tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def save_tokenizer(vocab_size: int, directory: Path) -> None:
    """Token `i` is the word `wi`, so each token is text that a stream can show at once."""
    words = {f"w{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="w0"
    )
    fast.save_pretrained(directory)


def save_random_adapter(
    shape: ModelShape, directory: Path, *, rank: int, seed: int, base: Path
) -> None:
    """Write a PEFT checkpoint with a LoRA of `rank` on every Linear of every decoder layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(shape))
    names = set()
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            names.add(name.rsplit(".", 1)[-1])
            prefix = f"base_model.model.model.layers.{name}"
            lora_a = torch.randn(rank, module.in_features, generator=generator)
            lora_b = torch.randn(module.out_features, rank, generator=generator)
            tensors[f"{prefix}.lora_A.weight"] = lora_a * module.in_features**-0.5
            tensors[f"{prefix}.lora_B.weight"] = lora_b * _LORA_B_STD
    config = LoraConfig(
        r=rank,
        lora_alpha=_ALPHA_PER_RANK * rank,
        target_modules=sorted(names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    directory.mkdir(parents=True)
    config.save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors")
