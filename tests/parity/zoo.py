"""Tiny random models of many architectures, saved as directories that a server could load.

Sized so that every mechanism acts on a prompt of a few dozen tokens: windows are shorter than the
prompts, soft caps are low enough to bend, attention sinks take a visible share. Weights spread
enough that the best two logits are not near ties, so greedy tokens can be compared exactly.
Knows nothing of Fathom.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

NUM_LAYERS = 4
NUM_BYTES = 256
"""Token ids below this are single bytes; `PAD`, `BOS` and `EOS` follow."""
PAD, BOS, EOS = 256, 257, 258
VOCAB_SIZE = 264
SLIDING_WINDOW = 12

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One cell of the zoo: how to configure it, and which Linear modules an adapter targets."""

    name: str
    make_config: Callable[[], PretrainedConfig]
    targets: tuple[str, ...] = LLAMA_LINEARS
    fan_in_fan_out: bool = False
    """True where the Linears are transformers' `Conv1D`, whose weights are transposed."""


def _config(config_class: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    given = {key: value for key, value in (common | fields).items() if value is not None}
    return lambda: getattr(transformers, config_class)(**given)


GQA = {"num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)

# Gemma scales its embeddings up: tied, a random one would only ever repeat its last token.
SERVED = (
    Architecture("llama", _config("LlamaConfig", **GQA)),
    Architecture("qwen2", _config("Qwen2Config", **GQA)),
    Architecture("qwen3", _config("Qwen3Config", **GQA, head_dim=16)),
    Architecture("mistral_window", _config("MistralConfig", **GQA, sliding_window=SLIDING_WINDOW)),
    Architecture(
        "gemma2",
        _config(
            "Gemma2Config",
            **GQA,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=SLIDING_WINDOW,
            layer_types=ALTERNATING,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=6.0,
            tie_word_embeddings=False,
        ),
    ),
    Architecture(
        "gemma3",
        _config(
            "Gemma3TextConfig",
            **GQA,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention"] * (NUM_LAYERS - 1) + ["full_attention"],
            tie_word_embeddings=False,
        ),
    ),
    Architecture(
        "phi3",
        _config("Phi3Config", **GQA),
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    Architecture(
        "gpt_neox",
        _config("GPTNeoXConfig"),
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    Architecture(
        "gpt2",
        _config("GPT2Config", intermediate_size=None),
        targets=("c_attn", "c_proj", "c_fc"),
        fan_in_fan_out=True,
    ),
    Architecture("olmo2", _config("Olmo2Config", **GQA)),
    Architecture(
        "gpt_oss",
        _config(
            "GptOssConfig",
            **GQA,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=SLIDING_WINDOW,
            layer_types=ALTERNATING,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        targets=ATTENTION_LINEARS,
    ),
    Architecture(
        "mixtral",
        _config("MixtralConfig", **GQA, num_local_experts=4, num_experts_per_tok=2),
        targets=ATTENTION_LINEARS,
    ),
    Architecture("qwen3_moe", _config("Qwen3MoeConfig", **GQA, **MOE), targets=ATTENTION_LINEARS),
    Architecture(
        "qwen2_moe",
        _config("Qwen2MoeConfig", **GQA, **MOE, shared_expert_intermediate_size=48),
        targets=ATTENTION_LINEARS,
    ),
    Architecture(
        "gemma",
        _config("GemmaConfig", num_key_value_heads=1, head_dim=16, tie_word_embeddings=False),
    ),
    Architecture(
        "phi", _config("PhiConfig"), targets=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    ),
    Architecture(
        "granite",
        _config(
            "GraniteConfig",
            **GQA,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.4,
            logits_scaling=2.0,
        ),
    ),
    Architecture("cohere", _config("CohereConfig", **GQA, logit_scale=0.5, use_qk_norm=True)),
    Architecture(
        "cohere2",
        _config(
            "Cohere2Config",
            **GQA,
            logit_scale=0.5,
            sliding_window=SLIDING_WINDOW,
            layer_types=ALTERNATING,
        ),
    ),
    Architecture("stablelm", _config("StableLmConfig", **GQA, use_qkv_bias=True)),
    Architecture(
        "starcoder2",
        _config("Starcoder2Config", **GQA, sliding_window=SLIDING_WINDOW),
        targets=(*ATTENTION_LINEARS, "c_fc", "c_proj"),
    ),
    Architecture("smollm3", _config("SmolLM3Config", **GQA, no_rope_layer_interval=2)),
    Architecture("olmo", _config("OlmoConfig", **GQA, clip_qkv=4.0)),
    Architecture(
        "exaone4",
        _config("Exaone4Config", **GQA, sliding_window=SLIDING_WINDOW, layer_types=ALTERNATING),
    ),
    Architecture(
        "olmo3",
        _config("Olmo3Config", **GQA, sliding_window=SLIDING_WINDOW, layer_types=ALTERNATING),
    ),
    Architecture(
        "glm4",
        _config("Glm4Config", **GQA, head_dim=16),
        targets=(*ATTENTION_LINEARS, "gate_up_proj", "down_proj"),
    ),
    Architecture(
        "nemotron",
        _config("NemotronConfig", **GQA, head_dim=16),
        targets=(*ATTENTION_LINEARS, "up_proj", "down_proj"),
    ),
    Architecture(
        "gpt_bigcode",
        _config("GPTBigCodeConfig", intermediate_size=None, n_inner=96, multi_query=True),
        targets=("c_attn", "c_proj", "c_fc"),
    ),
    Architecture(
        "opt",
        _config("OPTConfig", intermediate_size=None, ffn_dim=96, word_embed_proj_dim=64),
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
)

MLA_HEADS = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MLA = MLA_HEADS | {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA_FIELDS = {"num_attention_heads": None, "intermediate_size": None}

REFUSED = (
    Architecture("deepseek_v2", _config("DeepseekV2Config", num_key_value_heads=4, **MLA)),
    Architecture("deepseek_v3", _config("DeepseekV3Config", num_key_value_heads=4, **MLA)),
    Architecture("mamba", _config("MambaConfig", state_size=4, **MAMBA_FIELDS)),
    Architecture(
        "jamba",
        _config(
            "JambaConfig",
            **GQA,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            mamba_d_state=4,
        ),
    ),
    Architecture(
        "qwen3_next",
        _config(
            "Qwen3NextConfig",
            **GQA,
            **MOE,
            shared_expert_intermediate_size=48,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"] * (NUM_LAYERS // 2),
        ),
    ),
    Architecture(
        "llama4",
        _config(
            "Llama4TextConfig",
            **GQA,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=8,
        ),
    ),
    Architecture(
        "t5",
        _config(
            "T5Config",
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=PAD,
            hidden_size=None,
            num_attention_heads=None,
            num_hidden_layers=None,
            intermediate_size=None,
        ),
    ),
)

ODD = (
    # Positions or masks that reach attention by other ways than its arguments.
    Architecture("bloom", _config("BloomConfig", intermediate_size=None, n_head=4, n_layer=4)),
    Architecture("mpt", _config("MptConfig", d_model=64, n_heads=4, n_layers=4, max_seq_len=256)),
    Architecture("gptj", _config("GPTJConfig", rotary_dim=8, intermediate_size=None)),
    Architecture(
        "gpt_neo",
        _config(
            "GPTNeoConfig",
            num_layers=4,
            num_heads=4,
            window_size=SLIDING_WINDOW,
            attention_types=[[["global", "local"], 2]],
        ),
    ),
    # Attention that is not one softmax over the keys and values of its own layer.
    Architecture("diffllama", _config("DiffLlamaConfig", **GQA)),
    Architecture("doge", _config("DogeConfig", **GQA, keep_window_size=8)),
    Architecture(
        "gemma3n",
        _config(
            "Gemma3nTextConfig",
            **GQA,
            head_dim=16,
            sliding_window=SLIDING_WINDOW,
            layer_types=ALTERNATING,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * NUM_LAYERS,
        ),
    ),
    Architecture(
        "gemma4",
        _config(
            "Gemma4TextConfig",
            **GQA,
            head_dim=16,
            global_head_dim=32,
            sliding_window=SLIDING_WINDOW,
            layer_types=ALTERNATING,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=16,
            tie_word_embeddings=False,
        ),
    ),
    Architecture("minicpm3", _config("MiniCPM3Config", num_key_value_heads=4, **MLA_HEADS)),
    Architecture(
        "lfm2",
        _config("Lfm2Config", **GQA, layer_types=["conv", "full_attention"] * (NUM_LAYERS // 2)),
    ),
    Architecture(
        "minimax",
        _config(
            "MiniMaxConfig",
            **GQA,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["linear_attention", "full_attention"] * (NUM_LAYERS // 2),
        ),
    ),
    Architecture("bert", _config("BertConfig")),
    # Windows that only the mask carries and that a short test at load never reaches.
    Architecture(
        "phimoe_window",
        _config(
            "PhimoeConfig", **GQA, num_local_experts=2, num_experts_per_tok=1, sliding_window=200
        ),
    ),
    Architecture(
        "qwen2_moe_window",
        _config(
            "Qwen2MoeConfig",
            **GQA,
            **MOE,
            shared_expert_intermediate_size=48,
            use_sliding_window=True,
            sliding_window=200,
            max_window_layers=0,
        ),
    ),
)
"""Served right or refused: which of the two is the engine's choice, silently wrong is not."""

BY_NAME = {architecture.name: architecture for architecture in (*SERVED, *REFUSED, *ODD)}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from this seed inside, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def spread_weights(model: torch.nn.Module) -> None:
    """Redraw all parameters: layers matter, biases and norms differ, the best logit is clear."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
                parameter.normal_(std=0.4)
            elif parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "sinks" in name:
                parameter.normal_(std=1.0)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def build_model(architecture: Architecture, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode."""
    config = architecture.make_config()
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    with seeded(seed):
        model = auto.from_config(config, dtype=torch.float32)
        spread_weights(model)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ids equal to the bytes' values, then pad, bos and eos."""
    # pre_tokenizers.ByteLevel writes byte b as the character that GPT-2's table gives it.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(NUM_BYTES) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(NUM_BYTES + place) for place, byte in enumerate(hidden)}
    vocab = {character[byte]: byte for byte in range(NUM_BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_model(architecture: Architecture, directory: Path, *, seed: int = 0) -> Path:
    """Write model and tokenizer into `directory` and return it."""
    build_model(architecture, seed=seed).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def random_prompt(num_tokens: int, *, seed: int) -> tuple[int, ...]:
    """Token ids of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(NUM_BYTES, (num_tokens,), generator=generator).tolist())
