"""The test at load notices an attention that is not the model's, and lets through one that is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedConfig

from server.config import Settings
from server.engine.core import EngineCore
from server.errors import ModelError
from server.model import attention
from server.model.attention import AttentionVariant
from server.model.native.step import NativeStep
from server.model.runner import ModelRunner
from server.model.sdpa import AttentionStep
from tests.parity.zoo import BY_NAME, Architecture, save_model
from tests.tiny import num_hooks

Change = Callable[[AttentionVariant], AttentionVariant]


def _long_window() -> PreTrainedConfig:
    config = BY_NAME["mistral_window"].make_config()
    config.sliding_window = 128
    return config


LONG_WINDOW = Architecture("long_window", _long_window)
"""A window longer than the test's prompt: only shrunk does it show."""

BREAKS: dict[str, tuple[str, Change]] = {
    "window": ("mistral_window", lambda v: replace(v, sliding_window=None)),
    "window that the prompt does not reach": (
        "long_window",
        lambda v: replace(v, sliding_window=None),
    ),
    "window off by one": (
        "mistral_window",
        lambda v: replace(v, sliding_window=v.sliding_window and v.sliding_window + 1),
    ),
    "window of some layers": ("gemma3", lambda v: replace(v, sliding_window=None)),
    "softcap": ("gemma2", lambda v: replace(v, softcap=None)),
    "sinks": ("gpt_oss", lambda v: replace(v, sinks=None)),
    "scaling": ("granite", lambda v: replace(v, scaling=0.25)),
}
"""What is forgotten, and an architecture that needs it."""

NEEDED_BY_NONE = {
    "window": ("llama", BREAKS["window"][1]),
    "softcap": ("mistral_window", BREAKS["softcap"][1]),
    "sinks": ("gemma2", BREAKS["sinks"][1]),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Open an engine on the zoo's model of this name; returns after it passed the test."""
    root = tmp_path_factory.mktemp("models")

    def opened(name: str, dtype: str = "float32") -> ModelRunner:
        path = root / name
        if not path.exists():
            save_model(BY_NAME.get(name, LONG_WINDOW), path)
        settings = Settings(model=str(path), device="cpu", dtype=dtype, kv_cache_bytes=1 << 20)
        core = EngineCore.from_settings(settings)
        core.close()
        return core.runner

    return opened


Attend = Callable[..., torch.Tensor]


def _forgetting(to: Change, attend: Attend) -> Attend:
    return lambda step, layer_idx, *args: attend(step, layer_idx, *args[:-1], to(args[-1]))


def _losing(how: str, attend: Attend) -> Attend:
    """What was written in steps before."""

    def losing(step: AttentionStep, layer_idx: int, *args: Any) -> torch.Tensor:
        if how == "block table":
            spans = [replace(span, blocks=torch.zeros_like(span.blocks)) for span in step.prefills]
            blocks = torch.zeros_like(step.decode_blocks)
            return attend(replace(step, prefills=spans, decode_blocks=blocks), layer_idx, *args)
        for pool in (step.cache.keys[layer_idx], step.cache.values[layer_idx]):
            pool.zero_()
        return attend(step, layer_idx, *args)

    return losing


@pytest.fixture
def change_variant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    def change(to: Change) -> None:
        for layout in (AttentionStep, NativeStep):
            monkeypatch.setattr(layout, "attend", _forgetting(to, layout.attend))

    return change


@pytest.mark.parametrize("what", BREAKS)
def test_an_attention_that_forgets_what_the_model_needs_is_refused(
    load: Callable[..., Any], change_variant: Callable[[Change], None], what: str
) -> None:
    architecture, forget = BREAKS[what]
    load(architecture)
    change_variant(forget)
    with pytest.raises(ModelError, match=r"differ from\s+model.generate") as refusal:
        load(architecture)
    assert refusal.value.code == "model_refused"


@pytest.mark.parametrize("what", NEEDED_BY_NONE)
def test_what_the_model_does_not_need_is_not_missed(
    load: Callable[..., Any], change_variant: Callable[[Change], None], what: str
) -> None:
    architecture, forget = NEEDED_BY_NONE[what]
    change_variant(forget)
    load(architecture)


def test_positions_that_ignore_what_came_before_are_refused(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an architecture that counts positions by itself."""
    forward = LlamaForCausalLM.forward

    def restarting(
        self: Any, *args: Any, position_ids: torch.Tensor, use_cache: bool, **kwargs: Any
    ) -> Any:
        if not use_cache:  # that is ours: transformers' own generate keeps a cache
            position_ids = position_ids - position_ids.min()
        return forward(self, *args, position_ids=position_ids, use_cache=use_cache, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", restarting)
    with pytest.raises(ModelError, match="is refused"):
        load("llama")


@pytest.mark.parametrize("how", ["block table", "cache"])
def test_a_cache_that_loses_its_content_is_refused(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for layout in (AttentionStep, NativeStep):
        monkeypatch.setattr(layout, "attend", _losing(how, layout.attend))
    with pytest.raises(ModelError, match="is refused"):
        load("llama")


@pytest.mark.parametrize("what", [*BREAKS, "block table", "cache"])
def test_kernels_at_fault_are_not_used(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    architecture = BREAKS[what][0] if what in BREAKS else "llama"
    assert load(architecture).attention_name == "native"
    attend = NativeStep.attend
    broken = _forgetting(BREAKS[what][1], attend) if what in BREAKS else _losing(what, attend)
    monkeypatch.setattr(NativeStep, "attend", broken)
    assert load(architecture).attention_name == "sdpa"


def test_logits_that_are_not_finite_are_refused(
    load: Callable[..., Any], change_variant: Callable[[Change], None]
) -> None:
    change_variant(lambda variant: replace(variant, scaling=float("nan")))
    with pytest.raises(ModelError, match="nan"):
        load("llama")


def test_half_precision_passes_and_is_still_tested(
    load: Callable[..., Any], change_variant: Callable[[Change], None]
) -> None:
    load("mistral_window", dtype="bfloat16")
    change_variant(BREAKS["window"][1])
    with pytest.raises(ModelError, match="is refused"):
        load("mistral_window", dtype="bfloat16")


@pytest.mark.parametrize("name", ["mistral_window", "gemma3", "gpt_oss"])
def test_the_test_leaves_no_trace(load: Callable[..., Any], name: str) -> None:
    model = load(name).model
    fresh = BY_NAME[name].make_config()
    assert model.config.sliding_window == fresh.sliding_window
    windows = {getattr(module, "sliding_window", None) for module in model.modules()}
    assert windows <= {fresh.sliding_window, None}
    assert model.config._attn_implementation == attention.ATTENTION_NAME
    assert num_hooks(model) == 0
