"""Base weights, tokenizer, device and dtype: everything that is known once a model is loaded.

Loads with transformers alone (a directory or a hub id), probes which layers call attention and how
wide their cache is, and refuses what the engine cannot serve with a `ModelError` that says why. The
proof that what is left computes the right thing is `selftest`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from boundary.fingerprint import base_fingerprint
from server.errors import ModelError
from server.model import attention, context, meta_shapes
from server.model import quantization as quantizing
from server.model.attention import AttentionVariant
from server.model.attention_probe import AttentionProbe
from server.model.kv_cache import KVSpec
from server.model.quantization import Quantization
from server.model.targets import Targets

Progress = Callable[[str, int, int], None]
"""`(what, done, total)`"""

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model ready for the runner."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str
    revision: str
    """Names this content of the base model: part of every cache key."""
    num_layers: int
    vocab_size: int
    max_position: int
    kv_specs: list[KVSpec]
    attention_variants: list[AttentionVariant]
    eos_token_ids: frozenset[int]


def pick_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one. Raises ModelError for a CUDA that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("device is cuda, but this torch sees no CUDA device", param="device")
    return torch.device("cuda:0" if device == "cuda" else device)


def pick_dtype(dtype: str, device: torch.device, config: PreTrainedConfig) -> torch.dtype:
    """`auto` is float32 on a CPU and the checkpoint's own (bfloat16 for float32) on a GPU."""
    if dtype != "auto":
        picked: torch.dtype = getattr(torch, dtype)
        return picked
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


@torch.inference_mode()
def load(
    path: str,
    revision: str | None,
    device: str,
    dtype: str,
    progress: Progress | None = None,
    quantization: Quantization = "none",
) -> LoadedModel:
    """Load and probe a base model. `path` is a directory or a hub id. Raises ModelError."""
    report = progress or (lambda what, done, total: None)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no model could be read at {path!r}: {error}", param="model") from error
    refuse_config(config)
    torch_device = pick_device(device)
    if quantization != "none" and (reason := quantizing.why_not()) is not None:
        raise ModelError(f"quantization {quantization} {reason}", param="quantization")
    attention.register()
    report("weights", 0, 1)
    if progress is not None:
        # Ours is the progress the user sees; transformers' bar would be drawn over it.
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with meta_shapes.without_compiler():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                revision=revision,
                config=config,
                dtype=pick_dtype(dtype, torch_device, config),
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model at {path!r} does not load: {error}", param="model") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers has drawn them at random, with no more than a line in the log
        raise ModelError(
            f"the model at {path!r} has no weights for {len(missing)} of its tensors: "
            + ", ".join(missing[:5]),
            param="model",
        )
    torch.nn.Module.to(model, device=torch_device)
    torch.nn.Module.eval(model).requires_grad_(False)
    report("weights", 1, 1)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelError(f"no tokenizer at {path!r}: {error}", param="model") from error
    text_config = model.config.get_text_config()
    fingerprint = base_fingerprint(path, config, sorted(model.state_dict().items()))
    if quantization == "int8":
        report("int8 weights", 0, 1)
        quantizing.quantize(model, Targets(model))
        report("int8 weights", 1, 1)
    use_paged_attention(model)
    kv_specs, variants = probe_attention(model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        path=path,
        revision=fingerprint + quantizing.REVISION_ENDING[quantization],
        num_layers=text_config.num_hidden_layers,
        vocab_size=model.get_output_embeddings().weight.shape[0],  # type: ignore[no-untyped-call]
        max_position=max_position(text_config),
        kv_specs=kv_specs,
        attention_variants=variants,
        eos_token_ids=eos_token_ids(model, tokenizer),
    )


def refuse_config(config: PreTrainedConfig) -> None:
    """Raise ModelError for what the configuration alone shows cannot be served."""
    text = config.get_text_config()
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"{kind} is an encoder-decoder model; Fathom serves decoder-only models")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ModelError(
            f"{kind} uses multi-head latent attention (MLA), which the paged cache does not hold"
        )
    layer_types = set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if layer_types:
        raise ModelError(
            f"{kind} has layers of type {', '.join(sorted(layer_types))}; only full and sliding-window "
            "attention are served (no state-space, linear or chunked attention)"
        )
    if getattr(text, "num_hidden_layers", None) is None:
        raise ModelError(f"{kind} has no num_hidden_layers: depth would have no meaning")


def use_paged_attention(model: PreTrainedModel) -> None:
    """Switch the model's attention to ours. Raises ModelError where the architecture cannot."""
    try:
        model.set_attn_implementation(attention.ATTENTION_NAME)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{_name(model)} does not take a custom attention: {error}") from error
    if model.config.get_text_config()._attn_implementation != attention.ATTENTION_NAME:
        raise ModelError(f"{_name(model)} does not use transformers' AttentionInterface")


def probe_attention(model: PreTrainedModel) -> tuple[list[KVSpec], list[AttentionVariant]]:
    """The cache each layer needs and the attention it asks for, learned from one short forward pass.

    Raises ModelError unless every decoder layer calls attention exactly once.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    probe = AttentionProbe()
    token_ids = torch.tensor([[1, 2, 3]], device=model.device)
    positions = torch.arange(3, device=model.device).unsqueeze(0)
    with context.step(context.StepContext(probe)):
        try:
            model(input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        except (TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise ModelError(f"{_name(model)} does not run a packed step: {error}") from error
    if sorted(probe.calls) != list(range(num_layers)):
        silent = sorted(set(range(num_layers)) - set(probe.calls))
        raise ModelError(
            f"{_name(model)}: every one of the {num_layers} layers must call attention once; "
            f"layers without attention: {silent or 'none'} (hybrid state-space models and shared "
            "caches are not served)"
        )
    layers = range(num_layers)
    return [probe.specs[i] for i in layers], [probe.variants[i] for i in layers]


def max_position(config: PreTrainedConfig) -> int:
    """The longest context that position embeddings serve with one set of frequencies.

    Scalings that change with the length of the running sequence (dynamic NTK, longrope) would make a
    row's result depend on its neighbours in the step, so there it ends at the original length.
    """
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    rope = getattr(config, "rope_parameters", None) or {}
    groups: list[dict[str, Any]] = (
        [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    )
    for group in groups:
        if group.get("rope_type") in ("dynamic", "longrope"):
            original = group.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            longest = min(longest, int(original or longest))
    return longest


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a sequence, from the generation config and the tokenizer."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found)


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
