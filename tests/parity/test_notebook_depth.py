"""A bare PEFT model under `lora_depth` is the model that the server serves, and what PEFT alone can make.

Two witnesses that share no code with it: the engine's own hooks at the same depth, and PEFT with
`lora_B` zeroed in the layers above. DoRA divides by a norm that `lora_B` is part of, and keeps its
magnitudes where `lora_B` is zero, so of it the zeroed copy is a witness at full depth alone.
"""

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from boundary import lora_depth
from tests.parity.adapters import expected_peft_warnings
from tests.parity.conftest import AdapterPath, ModelPath
from tests.parity.generation import generate, greedy, open_core
from tests.parity.oracle import LAYER_IDX
from tests.parity.zoo import NUM_LAYERS, SLIDING_WINDOW, random_prompt

LOGITS_ATOL = 1e-4
DEPTHS = range(NUM_LAYERS + 1)
PROMPT = random_prompt(2 * SLIDING_WINDOW, seed=7)
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "mixtral")
VARIANTS = [
    *((name, "plain") for name in ARCHITECTURES),
    ("llama", "dora"),
    ("llama", "rslora"),
    ("llama", "patterns"),
    ("llama", "lora_bias"),
    ("llama", "lm_head_and_low_layers"),
    ("llama", "embedding"),
]


def load(model: Path, adapter: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with expected_peft_warnings():
        return PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def last_logits(model: PeftModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    return logits


def zero_above(model: PeftModel, depth: int) -> None:
    """Modules of PEFT's own, by the names of their weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = LAYER_IDX.search(name)
            needed = int(found[1]) + 1 if found else NUM_LAYERS if "lm_head" in name else 1
            if ("lora_B" in name or "lora_embedding_B" in name) and depth < needed:
                parameter.zero_()


@pytest.mark.parametrize(("architecture", "variant"), VARIANTS)
def test_a_depth_is_the_servers_and_that_of_zeroed_layers(
    model_path: ModelPath, adapter_path: AdapterPath, architecture: str, variant: str
) -> None:
    paths = model_path(architecture), adapter_path(architecture, variant)
    with open_core(paths[0]) as core:
        core.registry.load("a", paths[1])
        requests = [greedy(str(d), PROMPT, core.registry.select("a", d), 1) for d in DEPTHS]
        served = {int(name): one.logits[0] for name, one in generate(core, requests).items()}
    model, zeroed = load(*paths), load(*paths)
    seen = []
    for depth in DEPTHS:
        with lora_depth(model, depth):
            seen.append(last_logits(model))
        torch.testing.assert_close(seen[-1], served[depth], rtol=0, atol=LOGITS_ATOL)
    for depth in reversed(DEPTHS):  # each copy is zeroed further
        zero_above(zeroed, depth)
        if variant != "dora" or depth == NUM_LAYERS:
            torch.testing.assert_close(seen[depth], last_logits(zeroed), rtol=0, atol=LOGITS_ATOL)
    # Negative control: neither witness is the neighbouring depth's.
    apart = [(lower - upper).abs().max() for lower, upper in itertools.pairwise(seen)]
    reached = (
        {0, 1, NUM_LAYERS - 1} if variant == "lm_head_and_low_layers" else set(range(NUM_LAYERS))
    )
    assert {depth for depth, most in enumerate(apart) if most > 100 * LOGITS_ATOL} == reached
