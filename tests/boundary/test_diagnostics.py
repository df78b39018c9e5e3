"""Logit lens and LoRA output norms, against sweeps and against the adapter's own matrices."""

from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from boundary.depth import decoder_layers, lora_depth, lora_modules
from boundary.diagnostics import (
    depth_of_sharpest_rise,
    logit_lens,
    logit_lens_slices,
    lora_output_norms,
    lora_output_norms_slices,
)
from boundary.progress import Progress, drain
from boundary.rows import PeftLoraRows
from boundary.sweep import sweep
from tests.boundary.adapted import HookedRows, Sample, Untouched, adapted, samples_of
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model, random_prompt

View = Callable[..., Generator[Progress, None, object]]

SAMPLES = [Sample(random_prompt(n, seed=n), random_prompt(1, seed=n + 50)) for n in (4, 9)]


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [("llama", "plain"), ("llama", "lm_head"), ("gemma2", "plain"), ("gpt2", "dora")],
)
def test_after_the_last_layer_the_lens_sees_the_model(
    architecture: str, variant: str, tmp_path: Path
) -> None:
    model = adapted(BY_NAME[architecture], variant, tmp_path)
    lens = logit_lens(model, SAMPLES)
    assert lens.base.shape == lens.full.shape == (len(SAMPLES), NUM_LAYERS)
    # Completions of one token: their mean probability is the exponential of their score.
    scores = np.exp(sweep(model, SAMPLES))
    np.testing.assert_allclose(lens.base[:, -1], scores[:, 0], rtol=1e-4)
    np.testing.assert_allclose(lens.full[:, -1], scores[:, -1], rtol=1e-4)


@pytest.mark.parametrize("depth", [0, NUM_LAYERS])
def test_the_lens_is_norm_and_head_of_each_layers_output(depth: int, tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "plain", tmp_path)
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
    model = adapted(BY_NAME["llama"], "some_layers", tmp_path)  # layers 0 and 2
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


@torch.no_grad()
def norms_of_a_plain_pass(model: PeftModel, sample: Sample) -> list[float]:
    """What each module puts out, less what the module that it wraps would, in PEFT's own forward."""
    squares = [0.0] * NUM_LAYERS
    token_ids = [*sample.prompt_token_ids, *sample.completion_token_ids]

    def hooked(layer_idx: int) -> Callable[..., None]:
        def hook(module: LoraLayer, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            added = output - module.get_base_layer()(*args)
            squares[layer_idx] += added.double().square().sum().item() / len(token_ids)

        return hook

    handles = [
        module.register_forward_hook(hooked(layer_idx))
        for _, module, layer_idx in lora_modules(model)
    ]
    model(input_ids=torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    return [square**0.5 for square in squares]


@pytest.mark.parametrize("variant", ["dora", "lora_bias", "embedding", "lm_head"])
@pytest.mark.parametrize("max_logits", [1, 1 << 26])
def test_norms_are_those_of_a_plain_pass(variant: str, max_logits: int, tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], variant, tmp_path)
    found = drain(lora_output_norms_slices(model, SAMPLES, max_logits=max_logits))
    expected = [norms_of_a_plain_pass(model, sample) for sample in SAMPLES]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.min() > 0


@torch.no_grad()
def test_another_kind_of_rows_gives_the_same_views(tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "plain", tmp_path)
    plain = build_model(BY_NAME["llama"])
    rows = HookedRows(plain, model)
    norms = lora_output_norms(plain, SAMPLES, rows=rows)
    np.testing.assert_allclose(norms, lora_output_norms(model, SAMPLES), rtol=1e-4)
    lens, expected = logit_lens(plain, SAMPLES, rows=rows), logit_lens(model, SAMPLES)
    np.testing.assert_allclose(lens.base, expected.base, rtol=1e-4)
    np.testing.assert_allclose(lens.full, expected.full, rtol=1e-4)


def test_the_lens_is_the_same_a_few_logits_at_a_time(tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "lm_head", tmp_path)
    samples = samples_of((5, 7), (3, 4))
    whole = drain(logit_lens_slices(model, samples))
    parts = drain(logit_lens_slices(model, samples, max_logits=3 * 2 * 264))
    np.testing.assert_allclose(parts.full, whole.full, rtol=1e-5)
    np.testing.assert_allclose(parts.base, whole.base, rtol=1e-5)


@pytest.mark.parametrize("view", [logit_lens_slices, lora_output_norms_slices])
def test_between_slices_the_model_is_its_own(view: View, tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "dora", tmp_path)
    untouched = Untouched(model)
    seen = []
    for progress in view(model, SAMPLES):
        untouched.check()
        seen.append((progress.done, progress.total))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    slices = view(model, SAMPLES)
    next(slices), next(slices)
    slices.close()
    untouched.check()


def test_observing_ends_with_the_rows(tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "plain", tmp_path)
    rows, seen = PeftLoraRows(model), []
    with rows:
        rows.observe(lambda *added: seen.append(added))
    sweep(model, SAMPLES, rows=rows)
    assert seen == []


def test_observing_changes_no_output(tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "dora", tmp_path)
    (_, module, layer_idx), *_ = lora_modules(model)
    x = torch.randn(3, 2, 64)
    seen: list[tuple[int, torch.Tensor]] = []
    with torch.no_grad(), PeftLoraRows(model) as rows:
        rows.reach(layer_idx, 2, 3)
        before = module(x)
        rows.observe(lambda *added: seen.append(added))
        assert torch.equal(module(x), before)
        ((found, added),) = seen
        rows.reach(layer_idx, 0, 3)
        plain = module(x)
    assert found == layer_idx
    torch.testing.assert_close(added, before[:2] - plain[:2])
    assert len(seen) == 1  # no row applied LoRA the last time


@pytest.mark.parametrize(
    ("curve", "full_depth", "depth"),
    [
        ([0.1, 0.2, 0.8, 0.9], 4, 3),
        ([0.1, 0.8, 0.9, 0.9], 4, 2),
        ([0.1, 0.2, 0.3, 0.9], 4, 4),
        ([0.1, 0.2, 0.3, 0.9], 3, 2),  # what rises after the adapter's last layer is the base
        ([0.9, 0.1, 0.1, 0.3], 4, 4),
        ([0.9, 0.5, 0.4, 0.1], 4, 3),  # falls everywhere, the least before layer 2
        ([0.5], 1, 1),
        ([0.1, 0.9], 1, 1),
    ],
)
def test_depth_of_the_sharpest_rise(curve: list[float], full_depth: int, depth: int) -> None:
    assert depth_of_sharpest_rise(np.array(curve), full_depth) == depth


def test_an_empty_completion_has_no_probability(tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "plain", tmp_path)
    with pytest.raises(ValueError, match="sample 1 has an empty prompt or completion"):
        logit_lens(model, [SAMPLES[0], Sample((1, 2), ())])


def test_an_empty_prompt_has_no_norm(tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"], "plain", tmp_path)
    with pytest.raises(ValueError, match="sample 0 has an empty prompt"):
        lora_output_norms(model, [Sample((), (1, 2))])
