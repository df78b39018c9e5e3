"""The judge is judged first: the oracle's depths, and that the zoo's mechanisms show in logits."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.parity.adapters import EXTRA_VARIANTS, VARIANTS, expected_peft_warnings
from tests.parity.conftest import AdapterPath, ModelPath, OracleOf
from tests.parity.zoo import NUM_LAYERS, SERVED, SLIDING_WINDOW, random_prompt

PROMPT = random_prompt(3 * SLIDING_WINDOW, seed=5)
CLEAR = 0.05
"""Logits that differ by more are another model, not another rounding."""


def eager(path: Path, **config: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32, **config
    ).eval()


def last_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("variant", [*VARIANTS, *EXTRA_VARIANTS])
def test_depth_0_is_the_base_and_full_is_the_adapter_as_peft_loads_it(
    model_path: ModelPath, adapter_path: AdapterPath, oracle_of: OracleOf, variant: str
) -> None:
    base = eager(model_path("llama"))
    oracle = oracle_of("llama", variant)
    assert torch.equal(oracle.logits(PROMPT, 0)[-1], last_logits(base))
    with expected_peft_warnings():
        adapted = PeftModel.from_pretrained(base, adapter_path("llama", variant)).eval()
    assert torch.equal(oracle.logits(PROMPT, NUM_LAYERS)[-1], last_logits(adapted))


@pytest.mark.parametrize("architecture", [architecture.name for architecture in SERVED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_depth_is_another_model(oracle_of: OracleOf, architecture: str, variant: str) -> None:
    oracle = oracle_of(architecture, variant)
    depths = [oracle.logits(PROMPT, depth)[-1] for depth in range(NUM_LAYERS + 1)]
    for shallow, deep in pairwise(depths):
        assert (shallow - deep).abs().max() > CLEAR


@pytest.mark.parametrize(
    ("variant", "equal_depths"),
    [
        ("some_layers", [(1, 2), (3, 4)]),
        ("lm_head_and_low_layers", [(2, 3)]),
        ("lm_head", []),
        ("embedding", []),
    ],
)
def test_depths_are_equal_exactly_where_the_adapter_targets_nothing_between(
    oracle_of: OracleOf, variant: str, equal_depths: list[tuple[int, int]]
) -> None:
    oracle = oracle_of("llama", variant)
    depths = [oracle.logits(PROMPT, depth)[-1] for depth in range(NUM_LAYERS + 1)]
    for depth in range(NUM_LAYERS):
        is_equal = torch.equal(depths[depth], depths[depth + 1])
        assert is_equal == ((depth, depth + 1) in equal_depths), depth


@pytest.mark.parametrize(
    ("architecture", "without"),
    [
        ("mistral_window", {"sliding_window": None}),
        ("starcoder2", {"sliding_window": None}),
        ("gemma2", {"layer_types": ["full_attention"] * NUM_LAYERS}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("gemma3", {"layer_types": ["full_attention"] * NUM_LAYERS}),
        ("cohere2", {"layer_types": ["full_attention"] * NUM_LAYERS}),
        ("exaone4", {"layer_types": ["full_attention"] * NUM_LAYERS}),
        ("olmo3", {"layer_types": ["full_attention"] * NUM_LAYERS}),
        ("gpt_oss", {"layer_types": ["full_attention"] * NUM_LAYERS}),
        ("smollm3", {"no_rope_layers": [1] * NUM_LAYERS}),
        ("granite", {"attention_multiplier": 0.25}),
    ],
)
def test_an_engine_that_left_this_out_would_show(
    model_path: ModelPath, architecture: str, without: dict[str, Any]
) -> None:
    path = model_path(architecture)
    difference = last_logits(eager(path)) - last_logits(eager(path, **without))
    assert difference.abs().max() > CLEAR


def test_attention_sinks_show(model_path: ModelPath) -> None:
    with_sinks, without = eager(model_path("gpt_oss")), eager(model_path("gpt_oss"))
    for layer in without.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, -1e9)
    assert (last_logits(with_sinks) - last_logits(without)).abs().max() > CLEAR
