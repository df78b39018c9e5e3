"""Logit lens and LoRA output norms, against sweeps and against the adapter's own matrices."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from boundary.depth import decoder_layers, lora_depth
from boundary.diagnostics import logit_lens, lora_output_norms
from boundary.sweep import sweep
from tests.parity.adapters import expected_peft_warnings, save_adapter
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model, random_prompt


@dataclass(frozen=True)
class Sample:
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]


SAMPLES = [Sample(random_prompt(n, seed=n), random_prompt(1, seed=n + 50)) for n in (4, 9)]


def adapted(architecture: str, variant: str, directory: Path) -> PeftModel:
    save_adapter(BY_NAME[architecture], variant, directory)
    with expected_peft_warnings():
        return PeftModel.from_pretrained(build_model(BY_NAME[architecture]), directory).eval()


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [("llama", "plain"), ("llama", "lm_head"), ("gemma2", "plain"), ("gpt2", "dora")],
)
def test_after_the_last_layer_the_lens_sees_the_model(
    architecture: str, variant: str, tmp_path: Path
) -> None:
    model = adapted(architecture, variant, tmp_path)
    lens = logit_lens(model, SAMPLES)
    assert lens.base.shape == lens.full.shape == (len(SAMPLES), NUM_LAYERS)
    # Completions of one token: their mean probability is the exponential of their score.
    scores = np.exp(sweep(model, SAMPLES))
    np.testing.assert_allclose(lens.base[:, -1], scores[:, 0], rtol=1e-4)
    np.testing.assert_allclose(lens.full[:, -1], scores[:, -1], rtol=1e-4)


@pytest.mark.parametrize("depth", [0, NUM_LAYERS])
def test_the_lens_is_norm_and_head_of_each_layers_output(depth: int, tmp_path: Path) -> None:
    model = adapted("llama", "plain", tmp_path)
    (sample, *_) = SAMPLES
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda *hooked: outputs.append(hooked[-1]))
        for layer in decoder_layers(model)[1]
    ]
    with torch.no_grad(), lora_depth(model, depth):
        model(input_ids=torch.tensor([sample.prompt_token_ids]))
        llama = model.get_base_model()
        expected = [
            llama.lm_head(llama.model.norm(output))[0, -1].softmax(-1)
            for output in outputs[:NUM_LAYERS]
        ]
    for handle in handles:
        handle.remove()
    lens = logit_lens(model, [sample])
    found = (lens.full if depth else lens.base)[0]
    (token_id,) = sample.completion_token_ids
    np.testing.assert_allclose(found, [float(p[token_id]) for p in expected], rtol=1e-4)


@torch.no_grad()
def test_norms_are_those_of_the_adapters_matrices(tmp_path: Path) -> None:
    model = adapted("llama", "some_layers", tmp_path)  # layers 0 and 2
    inputs: dict[int, list[tuple[torch.nn.Module, torch.Tensor]]] = {0: [], 2: []}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kept=inputs[layer_idx]: kept.append((module, args[0]))
        )
        for layer_idx in inputs
        for module in decoder_layers(model)[1][layer_idx].modules()
        if hasattr(module, "lora_A")
    ]
    sample = SAMPLES[1]
    token_ids = [*sample.prompt_token_ids, *sample.completion_token_ids]
    model(input_ids=torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    expected = np.zeros(NUM_LAYERS)
    for layer_idx, calls in inputs.items():
        for module, x in calls:
            delta = module.lora_B["default"](module.lora_A["default"](x))
            delta *= module.scaling["default"]
            expected[layer_idx] += delta.square().sum().item() / len(token_ids)
    found = lora_output_norms(model, [sample])
    np.testing.assert_allclose(found, [np.sqrt(expected)], rtol=1e-4)
    assert (found[0] > 0).tolist() == [True, False, True, False]


def test_norms_leave_no_hook(tmp_path: Path) -> None:
    model = adapted("llama", "dora", tmp_path)
    norms = lora_output_norms(model, SAMPLES)
    assert norms.min() > 0
    assert not any(module._forward_hooks for module in model.modules())


def test_an_empty_completion_has_no_probability(tmp_path: Path) -> None:
    model = adapted("llama", "plain", tmp_path)
    with pytest.raises(ValueError, match="sample 1 has an empty prompt or completion"):
        logit_lens(model, [SAMPLES[0], Sample((1, 2), ())])
