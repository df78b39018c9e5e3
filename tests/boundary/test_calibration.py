"""Calibration of adapters whose best depth is known, because it wrote the samples."""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import boundary.calibration
import boundary.passes
from boundary.calibration import calibrate, calibrate_slices
from boundary.depth import lora_depth
from boundary.diagnostics import (
    LogitLens,
    depth_of_sharpest_rise,
    logit_lens,
    lora_output_norms,
)
from boundary.mask import depth_masks
from boundary.options import CalibrationOptions
from boundary.outcome import Calibration
from boundary.progress import Progress, Stopped
from boundary.rows import LoraRows
from boundary.selection import MIN_SAMPLES, proposing_half, select
from boundary.sweep import Scores, reference
from tests.boundary.adapted import HookedRows, Sample, Untouched, adapted
from tests.parity.adapters import expected_peft_warnings
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model, random_prompt

LLAMA = BY_NAME["llama"]
PLANTED_DEPTH = 2
NUM_SAMPLES = 36
PROMPTS = [Sample(random_prompt(6, seed=seed), ()) for seed in range(NUM_SAMPLES)]


def scale_upper_layers(model: PeftModel, factor: float) -> PeftModel:
    """Make what LoRA adds from `PLANTED_DEPTH` on greater or smaller."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and int(name.split(".layers.")[1].split(".")[0]) >= PLANTED_DEPTH:
                parameter.mul_(factor)
    return model


@torch.no_grad()
def written_at(model: PeftModel, depth: int, num_tokens: int = 3) -> list[Sample]:
    """The prompts, each followed by what the model writes at this depth."""
    token_ids = torch.tensor([sample.prompt_token_ids for sample in PROMPTS])
    prompt_len = token_ids.shape[1]
    with lora_depth(model, depth):
        for _ in range(num_tokens):
            following = model(input_ids=token_ids).logits[:, -1].argmax(dim=-1, keepdim=True)
            token_ids = torch.cat([token_ids, following], dim=1)
    rows = token_ids.tolist()
    return [Sample(tuple(row[:prompt_len]), tuple(row[prompt_len:])) for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    return adapted(LLAMA, "plain", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """An adapter whose upper layers only disturb what the lower ones do."""
    return scale_upper_layers(adapted(LLAMA, "plain", tmp_path_factory.mktemp("noisy")), 5.0)


@pytest.fixture(scope="module")
def planted(noisy: PeftModel) -> list[Sample]:
    return written_at(noisy, PLANTED_DEPTH)


@pytest.fixture(scope="module")
def found(noisy: PeftModel, planted: list[Sample]) -> Calibration:
    return calibrate(noisy, planted, CalibrationOptions(seed=3))


def test_upper_layers_that_are_noise_are_left_out(found: Calibration) -> None:
    selection = found.selection
    assert (selection.verdict, selection.depth) == ("improves", PLANTED_DEPTH)
    assert selection.best_depth == PLANTED_DEPTH
    assert selection.seed == 3


def test_an_adapter_whose_every_layer_matters_is_kept_whole(model: PeftModel) -> None:
    found = calibrate(model, written_at(model, NUM_LAYERS), CalibrationOptions())
    assert (found.selection.verdict, found.selection.depth) == ("keep_full", NUM_LAYERS)
    assert found.controls == {}  # all layers are all layers


def test_every_depth_is_scored_as_the_reference_scores_it(
    found: Calibration, noisy: PeftModel, planted: list[Sample]
) -> None:
    np.testing.assert_allclose(found.scores[:5], reference(noisy, planted[:5]), atol=1e-4)


def test_controls_have_the_proposed_depths_number_of_layers(
    found: Calibration, noisy: PeftModel, planted: list[Sample]
) -> None:
    assert list(found.controls) == ["top_k", "random_k"]
    for control in found.controls.values():
        assert {sum(mask) for mask in control.masks} == {PLANTED_DEPTH}
        by_mask = reference(noisy, planted, masks=control.masks)
        assert control.mean == pytest.approx(by_mask.mean(), abs=1e-4)
        held_out = list(found.selection.confirmed_on.sample_indices)  # type: ignore[union-attr]
        difference = found.scores[:, PLANTED_DEPTH] - by_mask.mean(axis=1)
        assert control.difference is not None
        assert control.difference.mean == pytest.approx(difference[held_out].mean(), abs=1e-4)
        assert control.difference.low > 0
    assert len(found.controls["random_k"].masks) == 5
    # The noisy layers put out the most, and are the wrong ones.
    assert found.controls["top_k"].masks == ((False, False, True, True),)


def test_layers_are_ranked_by_the_half_that_proposes(
    noisy: PeftModel, planted: list[Sample]
) -> None:
    options = CalibrationOptions(diagnostics=False)
    begun = [(p.stage, p.total) for p in calibrate_slices(noisy, planted, options) if not p.done]
    stages = list(dict.fromkeys(begun))  # waiting for the choice yields more than once
    assert stages == [
        ("score", NUM_SAMPLES * 5),
        ("choose", 1),
        ("norms", NUM_SAMPLES // 2),
        ("controls", stages[-1][1]),
    ]
    half = proposing_half(NUM_SAMPLES, options.seed)
    seen: list[Any] = []
    spied = boundary.passes.lora_output_norms_slices

    def spy(model: PeftModel, samples: Sequence[Sample], **options: Any) -> Any:
        seen.extend(samples)
        return spied(model, samples, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boundary.passes, "lora_output_norms_slices", spy)
        calibrate(noisy, planted, options)
    assert seen == [planted[index] for index in half]


def test_diagnostics_are_means_over_all_samples(
    found: Calibration, noisy: PeftModel, planted: list[Sample]
) -> None:
    lens, norms = logit_lens(noisy, planted), lora_output_norms(noisy, planted)
    assert found.lens is not None
    assert found.lens.base == pytest.approx(lens.base.mean(axis=0), rel=1e-4)
    assert found.lens.full == pytest.approx(lens.full.mean(axis=0), rel=1e-4)
    assert found.lora_norms == pytest.approx(norms.mean(axis=0), rel=1e-4)


def test_without_diagnostics_there_are_none(noisy: PeftModel, planted: list[Sample]) -> None:
    options = CalibrationOptions(diagnostics=False, num_random_masks=0)
    without = calibrate(noisy, planted, options)
    assert without.lens is without.lora_norms is None
    assert list(without.controls) == ["top_k"]


def test_what_it_took_is_counted_and_nothing_is_measured_twice(found: Calibration) -> None:
    taken = dict(found.num_layer_evaluations)
    assert taken.pop("controls") > 0
    assert taken == {
        "score": NUM_SAMPLES * NUM_LAYERS * (NUM_LAYERS + 3) // 2,
        "norms": NUM_SAMPLES * NUM_LAYERS,
        "lens": NUM_SAMPLES * NUM_LAYERS * 2,
    }


@pytest.mark.parametrize("labelled", [False, True])
def test_upper_layers_that_do_next_to_nothing_are_cheaper_without_labels(
    labelled: bool, tmp_path: Path
) -> None:
    model = scale_upper_layers(adapted(LLAMA, "plain", tmp_path), 1e-3)
    options = CalibrationOptions(metric="kl_to_full", tolerance=0.01, relative=True)
    samples = written_at(model, NUM_LAYERS) if labelled else PROMPTS
    found = calibrate(model, samples, options)
    assert (found.selection.verdict, found.selection.depth) == ("equal_cheaper", PLANTED_DEPTH)
    assert (found.scores <= 0).all()
    assert np.abs(found.scores[:, -1]).max() < 1e-5
    assert found.scores[:, 0].max() < -0.01
    assert set(found.controls) == {"top_k", "random_k"}
    assert (found.lens is None) == (not labelled)
    assert found.lora_norms is not None


def test_a_loss_of_more_than_the_tolerance_is_not_cheaper(model: PeftModel) -> None:
    options = CalibrationOptions(metric="kl_to_full", tolerance=0.01, relative=True)
    assert calibrate(model, PROMPTS, options).selection.verdict == "keep_full"


def test_scores_that_were_made_elsewhere_are_not_made_again(
    noisy: PeftModel, planted: list[Sample]
) -> None:
    """Exact match says depth 1; the controls are compared by likelihood, in which it loses."""
    rng = np.random.default_rng(0)
    scores = (rng.random((NUM_SAMPLES, NUM_LAYERS + 1)) < [0.1, 0.9, 0.2, 0.2, 0.1]).astype(float)
    options = CalibrationOptions(metric="exact_match", num_random_masks=2, diagnostics=False)
    found = calibrate(noisy, planted, options, scores=scores)
    assert found.scores is scores
    assert (found.selection.verdict, found.selection.depth) == ("improves", 1)
    assert "score" not in found.num_layer_evaluations
    chosen = reference(noisy, planted, masks=[depth_masks(NUM_LAYERS)[1]])[:, 0]
    held_out = list(found.selection.confirmed_on.sample_indices)  # type: ignore[union-attr]
    for control in found.controls.values():
        by_mask = reference(noisy, planted, masks=control.masks).mean(axis=1)
        assert control.mean == pytest.approx(by_mask.mean(), abs=1e-4)
        assert control.difference is not None
        difference = (chosen - by_mask)[held_out].mean()
        assert control.difference.mean == pytest.approx(difference, abs=1e-4)


def test_the_lens_proposes_and_the_scores_confirm(noisy: PeftModel, planted: list[Sample]) -> None:
    options = CalibrationOptions(method="lens")
    found = calibrate(noisy, planted, options)
    half = proposing_half(NUM_SAMPLES, options.seed)
    curve = logit_lens(noisy, [planted[index] for index in half]).full.mean(axis=0)
    depth = depth_of_sharpest_rise(curve, NUM_LAYERS)
    assert found.selection == select(found.scores, seed=0, proposed_depth=depth)
    assert found.selection.proposed_depth == depth
    assert found.num_layer_evaluations["lens"] == NUM_SAMPLES * NUM_LAYERS * 2


@pytest.mark.parametrize(("depth", "verdict"), [(PLANTED_DEPTH, "improves"), (3, "keep_full")])
def test_a_depth_off_the_lens_is_served_only_if_the_scores_confirm_it(
    depth: int,
    verdict: str,
    model: PeftModel,
    noisy: PeftModel,
    planted: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(boundary.calibration, "depth_of_sharpest_rise", lambda *_: depth)
    options = CalibrationOptions(method="lens", diagnostics=False)
    if verdict == "keep_full":
        noisy, planted = model, written_at(model, NUM_LAYERS)
    selection = calibrate(noisy, planted, options).selection
    assert (selection.proposed_depth, selection.verdict) == (depth, verdict)
    assert selection.depth == (NUM_LAYERS if verdict == "keep_full" else depth)


NUM_DEEP_LAYERS = 24


@pytest.fixture(scope="module")
def deep() -> PeftModel:
    """So many depths that the best of them looks good on any half of the samples."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_hidden_layers=NUM_DEEP_LAYERS,
    )  # fmt: skip
    with expected_peft_warnings():
        lora = LoraConfig(r=1, target_modules=["q_proj"])
        return get_peft_model(LlamaForCausalLM(config), lora).eval()


class Noise:
    """A calibration without a model: scores are noise, and the lens knows them.

    Of each sample the lens rises at the depth that happens to score best on it, so that whatever
    half of the samples the lens is read from, the proposed depth is good on that half.
    """

    def __init__(self, seed: int, patch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(seed)
        self.scores = rng.normal(size=(MIN_SAMPLES, NUM_DEEP_LAYERS + 1))
        self._rng = rng
        for name in ("logit_lens_slices", "lora_output_norms_slices", "sweep_slices"):
            patch.setattr(boundary.passes, name, getattr(self, name))
        self.samples = [Sample((index,), (1,)) for index in range(MIN_SAMPLES)]

    def logit_lens_slices(
        self, _: object, samples: Sequence[Sample], **__: object
    ) -> Generator[Progress, None, LogitLens]:
        yield Progress("lens", 0, len(samples))
        lens = np.zeros((len(samples), NUM_DEEP_LAYERS))
        rows = self.scores[[sample.prompt_token_ids[0] for sample in samples]]
        # Rises to depth d by what d scores more than full, for the mean to rise most at the best.
        lens[:, 1:] = (rows[:, 2:] - rows[:, -1:]).cumsum(axis=1)
        return LogitLens(base=lens, full=lens)

    def lora_output_norms_slices(
        self, _: object, samples: Sequence[Sample], **__: object
    ) -> Generator[Progress, None, Scores]:
        yield Progress("norms", 0, len(samples))
        return self._rng.random((len(samples), NUM_DEEP_LAYERS))

    def sweep_slices(
        self, _: object, samples: Sequence[Sample], *, masks: Sequence[object], **__: object
    ) -> Generator[Progress, None, Scores]:
        yield Progress("controls", 0, len(samples))
        return self._rng.normal(size=(len(samples), len(masks)))


def verdicts_on_noise(model: PeftModel, patch: pytest.MonkeyPatch) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in range(100):
        noise = Noise(seed, patch)
        options = CalibrationOptions(metric="exact_match", method="lens", seed=seed)
        calibration = calibrate(model, noise.samples, options, scores=noise.scores)
        found[calibration.selection.verdict] += 1
    return found


def test_noise_keeps_full_whatever_the_lens_says(
    deep: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verdicts_on_noise(deep, monkeypatch)
    assert found["keep_full"] >= 0.95 * found.total(), found


def test_noise_does_not_keep_full_if_the_lens_sees_the_half_that_confirms(
    deep: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""

    def confirming_half(num_samples: int, seed: int) -> tuple[int, ...]:
        return tuple(set(range(num_samples)) - set(proposing_half(num_samples, seed)))

    monkeypatch.setattr(boundary.calibration, "proposing_half", confirming_half)
    found = verdicts_on_noise(deep, monkeypatch)
    assert found["keep_full"] < 0.9 * found.total(), found


def test_too_few_samples_conclude_nothing_and_are_still_shown(
    noisy: PeftModel, planted: list[Sample]
) -> None:
    few = planted[: MIN_SAMPLES - 1]
    for method in ("sweep", "lens"):
        found = calibrate(noisy, few, CalibrationOptions(method=method))
        assert (found.selection.verdict, found.selection.depth) == ("too_few", NUM_LAYERS)
        assert found.controls == {}
        assert found.lens is not None


def test_an_adapter_of_some_layers_has_its_own_full_depth_and_budget(tmp_path: Path) -> None:
    model = adapted(LLAMA, "some_layers", tmp_path)  # layers 0 and 2
    samples = written_at(model, 1)  # only layer 0
    found = calibrate(model, samples, CalibrationOptions())
    assert (found.selection.verdict, found.selection.depth) == ("improves", 1)
    assert (found.scores[:, 3] == found.scores[:, 4]).all()
    masks = {mask for control in found.controls.values() for mask in control.masks}
    assert masks <= {(True, False, False, False), (False, False, True, False)}
    assert found.lora_norms is not None
    assert [norm > 0 for norm in found.lora_norms] == [True, False, True, False]


@torch.no_grad()
def test_another_kind_of_rows_gives_the_same_answer(
    found: Calibration, noisy: PeftModel, planted: list[Sample]
) -> None:
    plain = build_model(LLAMA)
    rows: LoraRows = HookedRows(plain, noisy)
    other = calibrate(plain, planted, CalibrationOptions(seed=3), rows=rows)
    assert other.selection.verdict == found.selection.verdict
    assert other.selection.depth == found.selection.depth
    np.testing.assert_allclose(other.scores, found.scores, atol=1e-4)
    assert other.lora_norms == pytest.approx(found.lora_norms, rel=1e-4)
    assert other.controls["top_k"].masks == found.controls["top_k"].masks


OPTIONS = CalibrationOptions(method="lens")  # which goes through every stage


def test_the_model_is_its_own_at_every_yield(noisy: PeftModel, planted: list[Sample]) -> None:
    untouched = Untouched(noisy)
    seen: Counter[str] = Counter()
    samples = planted[:MIN_SAMPLES]
    for progress in calibrate_slices(noisy, samples, OPTIONS, max_tokens=100):
        seen[progress.stage] += 1
        untouched.check()
    assert set(seen) == {"lens", "score", "choose", "norms", "controls"}
    assert min(count for stage, count in seen.items() if stage != "choose") > 10


@pytest.mark.parametrize("stage", ["lens", "score", "norms", "controls"])
def test_closing_half_way_leaves_nothing(
    stage: str, noisy: PeftModel, planted: list[Sample]
) -> None:
    untouched = Untouched(noisy)
    slices: Iterator[Progress] = calibrate_slices(noisy, planted, OPTIONS, max_tokens=100)
    for progress in slices:
        if progress.stage == stage and progress.done:
            break
    assert isinstance(slices, Generator)
    slices.close()
    untouched.check()


def test_stopping(noisy: PeftModel, planted: list[Sample]) -> None:
    untouched = Untouched(noisy)
    told: list[Progress] = []
    with pytest.raises(Stopped, match="in stage 'norms'"):
        calibrate(
            noisy,
            planted,
            OPTIONS,
            on_progress=told.append,
            should_stop=lambda: bool(told) and told[-1].stage == "norms" and told[-1].done > 3,
        )
    untouched.check()


def test_a_failure_half_way_leaves_nothing(
    noisy: PeftModel, planted: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = Untouched(noisy)

    def broken(*_: object) -> float:
        raise RuntimeError("broken head")

    handle = noisy.get_base_model().lm_head.register_forward_hook(broken)
    for method in ("lens", "sweep"):
        with pytest.raises(RuntimeError, match="broken head"):
            calibrate(noisy, planted, CalibrationOptions(method=method))
    handle.remove()
    untouched.check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": ""}, "metric must not be empty"),
        ({"method": "guess"}, "method must be one of .*'guess'"),
        ({"tolerance": -0.1}, "tolerance must be finite and not negative, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": float("inf")}, "tolerance"),
        ({"tolerance": 1.5, "relative": True}, "share of the gain must be at most 1, got 1.5"),
        ({"metric": "kl_to_full"}, "kl_to_full needs a tolerance"),
        ({"confidence": 0.4}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"num_random_masks": -1}, "num_random_masks must be between 0 and 64, got -1"),
        ({"num_random_masks": 65}, "num_random_masks"),
    ],
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**fields)


FULL_SCORES = np.zeros((1, NUM_LAYERS + 1))


@pytest.mark.parametrize(
    ("samples", "options", "arguments", "message"),
    [
        ([], {}, {}, "no samples"),
        (PROMPTS, {}, {}, "'log_likelihood' needs completions, and sample 0 has none"),
        (
            PROMPTS,
            {"metric": "kl_to_full", "tolerance": 1, "method": "lens"},
            {},
            "method 'lens' needs completions",
        ),
        (PROMPTS, {"metric": "rouge_l"}, {"scores": FULL_SCORES}, "'rouge_l' needs completions"),
        ([Sample((1,), (2,))], {"metric": "rouge_l"}, {}, "its scores must be given"),
        ([Sample((1,), (2,))] * 2, {}, {"scores": FULL_SCORES}, r"2 samples by 5 .* \(1, 5\)"),
        ([Sample((1,), (2,))], {}, {"scores": FULL_SCORES[:, 1:]}, r"by 5 depths, got \(1, 4\)"),
        ([Sample((1,), (2,))], {}, {"scores": FULL_SCORES * np.nan}, "not finite"),
        ([Sample((), (2,))], {}, {}, "sample 0 has no prompt"),
        ([Sample((1,), (2,))], {}, {"full_depth": 0}, "full_depth must be between 1 and 4, got 0"),
        ([Sample((1,), (2,))], {}, {"full_depth": 5}, "full_depth must be between 1 and 4, got 5"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    model: PeftModel,
    samples: list[Sample],
    options: dict[str, Any],
    arguments: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model, samples, CalibrationOptions(**options), **arguments)


def test_a_model_without_peft_needs_rows() -> None:
    with pytest.raises(TypeError, match="needs rows"):
        calibrate(build_model(LLAMA), [Sample((1,), (2,))], CalibrationOptions())
