"""A base model made ready to run: loaded, packed, tested against itself, with its cache.

The steps between `loader` and `runner`, in their order. Called once, by the engine's core.
"""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import structlog
import torch

from server.config import Settings
from server.errors import ModelError
from server.malloc import mapping
from server.model import (
    decode_attention,
    huge_pages,
    loader,
    norms,
    packed,
    packed_memory,
    products,
    selftest,
    varlen,
)
from server.model.attention import StepLayout
from server.model.gathered import GatheredSlots
from server.model.kv_cache import KVCache, plan_num_blocks
from server.model.loader import LoadedModel, Progress
from server.model.native import step as native
from server.model.native.library import Library
from server.model.native.library import load as load_library
from server.model.native.step import NativeStep
from server.model.recorder import CudaRecorder
from server.model.replay.lowered import BindChain
from server.model.runner import ModelRunner
from server.model.sdpa import AttentionStep
from server.model.siblings import find_siblings
from server.model.targets import Targets
from server.model.varlen import VarlenStep

log = structlog.get_logger(__name__)

_BLOCK_SIZE = 16
"""Tokens in a block where the attention kernel does not care."""


_MIN_COLLAPSED_BYTES = 4 << 20
"""A mapping this large is weights, which were just packed; activations come and go."""


def default_block_size(device: torch.device) -> int:
    """Tokens in a block where nobody chose: at most this many on this device."""
    return varlen.BLOCK_SIZE if device.type == "cuda" else _BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Everything the engine needs of the base model."""

    base: LoadedModel
    runner: ModelRunner
    max_model_len: int
    """The longest sequence that positions and cache both hold."""


@mapping()
def prepare(settings: Settings, progress: Progress | None = None) -> PreparedModel:
    """Load, pack, test and allocate. Raises ModelError with the reason for a model not served."""
    if settings.model is None:
        raise ModelError("no model is named", param="model")
    report = progress or (lambda what, done, total: None)
    base = loader.load(
        settings.model,
        settings.revision,
        settings.device,
        settings.dtype,
        progress,
        settings.quantization,
    )
    model = base.model
    targets = Targets(model)
    report("self-test", 0, 1)
    expected = selftest.expect(model)
    is_cuda, is_packed = model.device.type == "cuda", packed.is_available(model.device, model.dtype)
    siblings = (
        find_siblings(model, partial(loader.probe_attention, model)) if is_cuda or is_packed else []
    )
    if is_packed:
        packed.pack(model, siblings)
        packed_memory.trim()
        huge_pages.collapse(_MIN_COLLAPSED_BYTES)
    if is_cuda:
        products.share(model, siblings)
        norms.fuse(model)
    layout, error = _choose_attention(base, targets, expected, settings.block_size)
    report("self-test", 1, 1)
    block_size = settings.block_size or (varlen.BLOCK_SIZE if layout is VarlenStep else _BLOCK_SIZE)
    wanted_len = min(settings.max_model_len or base.max_position, base.max_position)
    num_blocks = plan_num_blocks(
        base.kv_specs,
        model.dtype,
        model.device,
        block_size=block_size,
        cache_bytes=settings.kv_cache_bytes,
        max_tokens=settings.max_num_seqs * wanted_len,
    )
    max_model_len = _max_model_len(settings, base, num_blocks * block_size)
    cache = KVCache(
        base.kv_specs, num_blocks, block_size, model.dtype, model.device, has_scratch=is_cuda
    )
    log.info(
        "model loaded",
        path=base.path,
        revision=base.revision,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=settings.quantization,
        attention=layout.name,
        max_model_len=max_model_len,
        kv_tokens=num_blocks * block_size,
        self_test_error=error,
    )
    # Stacks hold room for every slot in every layer, so without recordings, which need them, each
    # adapter has tensors of its own, and layers that are not resident take nothing.
    slots = None
    if is_cuda and settings.cuda_graphs:
        slots = GatheredSlots(targets, settings.max_loras, model.dtype, model.device)
    runner = ModelRunner(
        model, cache, targets, settings.max_loras, layout, slots, settings.max_lora_bytes
    )
    if layout is NativeStep and isinstance(library := load_library(), Library):
        runner.replay_steps(library, settings.max_num_seqs, settings.max_step_tokens)
    if slots is not None:
        runner.record_steps(
            CudaRecorder(model.device),
            settings.max_num_seqs,
            max_model_len,
            decode_attention.pick(
                model.device,
                model.dtype,
                model.config.get_text_config().num_attention_heads,
                list(zip(base.kv_specs, base.attention_variants, strict=True)),
                block_size,
            ),
            _bind_chain(),
        )
    return PreparedModel(base, runner, max_model_len)


def _bind_chain() -> BindChain | None:
    """What makes kernels of a recorded step's chains, where Triton is installed."""
    if find_spec("triton") is None:
        return None
    from server.model.replay import triton_chain

    return triton_chain.bind


def _choose_attention(
    base: LoadedModel, targets: Targets, expected: selftest.Expectation, block_size: int | None
) -> tuple[type[StepLayout], float]:
    """The fastest attention that passes the self-test, and its error there."""
    model = base.model
    device, dtype, specs = model.device, model.dtype, base.kv_specs
    layout: type[StepLayout]
    if device.type == "cuda":
        layout, size = VarlenStep, varlen.BLOCK_SIZE
        reason = varlen.why_not(device, dtype, specs, base.attention_variants, block_size)
    else:
        layout, size = NativeStep, _BLOCK_SIZE
        reason = native.why_not(device, dtype, specs)
    if reason is None:
        try:
            return layout, selftest.check(model, targets, specs, expected, layout, size)
        except (ModelError, RuntimeError) as failure:
            reason = str(failure)
    log.info("attention gathers", instead_of=layout.name, reason=reason)
    return AttentionStep, selftest.check(model, targets, specs, expected)


def _max_model_len(settings: Settings, base: LoadedModel, num_kv_tokens: int) -> int:
    wanted = settings.max_model_len
    if wanted is not None and wanted > base.max_position:
        raise ModelError(
            f"max_model_len {wanted} is over the {base.max_position} positions the model has",
            param="max_model_len",
        )
    if wanted is not None and wanted > num_kv_tokens:
        raise ModelError(
            f"max_model_len {wanted} does not fit the KV cache of {num_kv_tokens} tokens; "
            "raise kv_cache_bytes",
            param="kv_cache_bytes",
        )
    longest = min(wanted or base.max_position, num_kv_tokens)
    if longest < 2:
        raise ModelError("kv_cache_bytes is too small for one block", param="kv_cache_bytes")
    return longest
