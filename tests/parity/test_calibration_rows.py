"""A sweep over the model that serves, through the server's own hooks, is PEFT's one pass a depth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from boundary.diagnostics import lora_output_norms
from boundary.sample import Sample
from boundary.sweep import reference, sweep
from server.engine.core import EngineCore
from server.model.calibration_rows import calibration_rows
from server.model.checkpoint import LoraCheckpoint
from tests.parity.adapters import EXTRA_VARIANTS, VARIANTS, expected_peft_warnings
from tests.parity.conftest import AdapterPath, ModelPath
from tests.parity.generation import generate, greedy, open_core
from tests.parity.zoo import SERVED, random_prompt

ATOL = 1e-4
"""float32, log-likelihood in nats."""


@dataclass(frozen=True, slots=True)
class Tokens:
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]


UNEVEN: list[Sample] = [
    Tokens(random_prompt(prompt_len, seed=prompt_len), random_prompt(num, seed=99 + num))
    for prompt_len, num in ((25, 6), (7, 11), (1, 3))
]
"""The first crosses sliding windows; all are padded to its length."""


def plain_peft(model: Path, adapter: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="eager", dtype=torch.float32
    )
    with expected_peft_warnings():
        return PeftModel.from_pretrained(base, adapter).eval()


def content(core: EngineCore, adapter: Path) -> LoraCheckpoint:
    found = core.registry.load("adapter", adapter).content
    assert isinstance(found, LoraCheckpoint)
    return found


def check(model: Path, adapter: Path) -> None:
    expected = reference(plain_peft(model, adapter), UNEVEN)
    with (
        open_core(model) as core,
        calibration_rows(core.runner, content(core, adapter)) as rows,
    ):
        swept = sweep(core.runner.model, UNEVEN, rows=rows, max_tokens=300)
        assert core.runner.hooks.num_installed == 0
    assert np.abs(swept - expected).max() <= ATOL
    assert np.abs(np.diff(expected, axis=1)).max() > 10 * ATOL, (
        "depths that do not differ test nothing"
    )


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("architecture", [architecture.name for architecture in SERVED])
def test_every_architecture(
    architecture: str, variant: str, model_path: ModelPath, adapter_path: AdapterPath
) -> None:
    check(model_path(architecture), adapter_path(architecture, variant))


@pytest.mark.parametrize("variant", [*VARIANTS, *EXTRA_VARIANTS])
def test_every_variant(variant: str, model_path: ModelPath, adapter_path: AdapterPath) -> None:
    check(model_path("llama"), adapter_path("llama", variant))


def test_norms_are_those_of_peft(model_path: ModelPath, adapter_path: AdapterPath) -> None:
    for variant in ("plain", "dora", "embedding", "lm_head"):
        model, adapter = model_path("llama"), adapter_path("llama", variant)
        peft_model = plain_peft(model, adapter)
        expected = lora_output_norms(peft_model, UNEVEN)
        with (
            open_core(model) as core,
            calibration_rows(core.runner, content(core, adapter)) as rows,
        ):
            found = lora_output_norms(core.runner.model, UNEVEN, rows=rows)
        assert np.abs(found - expected).max() <= ATOL * np.abs(expected).max()


def test_steps_between_chunks_are_the_engines_own(
    model_path: ModelPath, adapter_path: AdapterPath
) -> None:
    """Requests that run between the chunks of a sweep give the same tokens, and the sweep the same scores."""
    model, adapter = model_path("gemma2"), adapter_path("gemma2", "plain")
    prompt = random_prompt(19, seed=3)
    with open_core(model) as core:
        checkpoint = content(core, adapter)

        def continuation(request_id: str) -> list[int]:
            lora = core.registry.select("adapter", 2)
            return list(generate(core, [greedy(request_id, prompt, lora, 5)])[request_id].token_ids)

        alone = continuation("alone")
        with calibration_rows(core.runner, checkpoint) as rows:
            undisturbed = sweep(core.runner.model, UNEVEN, rows=rows, max_tokens=40)
            between: list[list[int]] = []
            swept = sweep(
                core.runner.model,
                UNEVEN,
                rows=rows,
                max_tokens=40,
                on_progress=lambda done, _: between.append(continuation(f"after {done}")),
            )
        assert len(between) > 3
        assert between == [alone] * len(between)
        assert (swept == undisturbed).all()


def test_a_lent_slot_comes_back(model_path: ModelPath, adapter_path: AdapterPath) -> None:
    with open_core(model_path("llama"), max_loras=1) as core:
        checkpoint = content(core, adapter_path("llama", "plain"))
        assert core.runner.slots.acquire(1, checkpoint) == 0
        with (
            pytest.raises(RuntimeError, match="stop"),
            calibration_rows(core.runner, checkpoint),
            calibration_rows(core.runner, checkpoint),
        ):
            raise RuntimeError("stop")
        assert core.runner.slots.lend(checkpoint) == 1, "the first slot beside those of requests"
