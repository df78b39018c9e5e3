"""A PEFT model calibrated in memory: what `fathom calibrate` finds of its files, and a server believes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import boundary
from boundary import dataset, record
from boundary.options import CalibrationOptions
from boundary.progress import Progress, Stopped
from boundary.record import RecordError
from boundary.sweep import reference
from server import demo
from server.demo.load import load_adapted
from tests.boundary.adapted import Untouched, traces
from tests.conftest import Run
from tests.parity.adapters import expected_peft_warnings
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model, byte_tokenizer
from tests.test_calibrate import Case, plain_peft, plant, with_noise_above, write_samples
from tests.tiny import Tiny

ATOL = 1e-4


@pytest.fixture(scope="module")
def case(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An adapter whose upper layers are noise, and samples that show it."""
    place = tmp_path_factory.mktemp("notebook")
    case = Case(
        tiny.model_path,
        with_noise_above(tiny.adapter("a"), place / "noisy", 2),
        write_samples(place / "data.jsonl", 40, 0),
        write_samples(place / "test.jsonl", 10, 1),
    )
    plant(case, plain_peft(case), AutoTokenizer.from_pretrained(case.model))
    return case


@pytest.fixture
def model(case: Case) -> PeftModel:
    return plain_peft(case)


@pytest.fixture(scope="module")
def tokenizer(case: Case) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(case.model)


@pytest.fixture(scope="module")
def found(case: Case, tokenizer: PreTrainedTokenizerBase) -> boundary.Calibrated:
    return boundary.calibrate(plain_peft(case), tokenizer, case.data, name="noisy")


@pytest.fixture
def adapter(case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.adapter, tmp_path / "noisy"))


def records_of(case: Case) -> list[dict[str, str]]:
    return [json.loads(line) for line in case.data.read_text().splitlines()]


def served_depth(fathom: Run, case: Case, adapter: Path) -> int | None:
    """What a server makes of the record beside an adapter; None if it does not apply it."""
    status, out, _ = fathom(
        "adapters", str(case.model), "--adapter", f"noisy={adapter}", "--json", "--device", "cpu"
    )
    assert status == 0
    depth: int | None = json.loads(out)[0]["calibrated_depth"]
    return depth


def test_it_is_what_the_command_line_finds(
    case: Case, adapter: Path, found: boundary.Calibrated, fathom: Run
) -> None:
    status, out, err = fathom(
        "calibrate", str(case.model), str(adapter), "--data", str(case.data), "--write", "--json"
    )
    assert status == 0, err
    theirs, ours = record.read(adapter / "boundary.json"), found.record
    assert ours is not None
    assert (ours.verdict, ours.depth) == ("improves", found.depth)
    assert 0 < found.depth < NUM_LAYERS
    same = set(type(ours).model_fields) - {"curve", "confirmation", "created_at"}
    for name in same:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.curve is not None
    assert theirs.curve is not None
    for mine, other in zip(ours.curve, theirs.curve, strict=True):
        assert mine.score == pytest.approx(other.score, abs=ATOL)
        assert mine.to_full.low == pytest.approx(other.to_full.low, abs=ATOL)
    (report,) = json.loads(out)
    texts = [(one.prompt, dict(one.by_depth)) for one in found.report.outputs]
    assert len(texts) == 3
    assert texts == [
        (one["prompt"], {int(depth): text for depth, text in one["by_depth"].items()})
        for one in report["outputs"]
    ]
    assert found.report.lora_norms == pytest.approx(report["lora_norms"], rel=1e-5)
    assert {name: control.mean for name, control in found.report.controls.items()} == {
        name: pytest.approx(control["mean"], abs=ATOL)
        for name, control in report["controls"].items()
    }


def test_the_curve_is_that_of_one_forward_pass_a_depth(
    case: Case, found: boundary.Calibrated, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    samples = dataset.load(case.data, tokenizer, 256).samples[:5]
    scores = found.calibration.scores[:5]
    np.testing.assert_allclose(scores, reference(model, samples), atol=ATOL)
    assert np.ptp(scores, axis=1).min() > 100 * ATOL  # a curve, not one number for every depth


def test_texts_are_judged_as_the_command_line_judges_them(
    case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase, fathom: Run
) -> None:
    status, out, err = fathom(
        "calibrate", str(case.model), str(case.adapter), "--data", str(case.data), "--json",
        "--metric", "chrf", "--max-tokens", "4", "--max-samples", "32",
    )  # fmt: skip
    assert status == 0, err
    options = CalibrationOptions(metric="chrf")
    found = boundary.calibrate(
        model, tokenizer, case.data, options, max_tokens=4, max_samples=32, num_shown=0
    )
    (theirs,) = json.loads(out)
    curve = [point["score"] for point in theirs["selection"]["curve"]]
    assert [point.score for point in found.report.selection.curve] == pytest.approx(curve)
    assert len(set(curve)) > 1
    assert found.report.signature == theirs["signature"]
    assert found.report.outputs == ()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["arithmetic", "pirate", "restaurant"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_on_the_demo_it_is_what_the_command_line_finds(name: str, fathom: Run) -> None:
    status, out, err = fathom("calibrate", "--name", name, "--max-samples", "48", "--json")
    assert status == 0, err
    model, tokenizer = load_adapted(name, demo.DATA)
    found = boundary.calibrate(model, tokenizer, demo.valid_path(name), max_samples=48)
    (theirs,) = json.loads(out)
    assert (found.verdict, found.depth) == (theirs["verdict"], theirs["depth"])
    assert found.report.known_fingerprints == theirs["fingerprints"]
    curve = [point["score"] for point in theirs["selection"]["curve"]]
    ours = [point.score for point in found.report.selection.curve]
    np.testing.assert_allclose(ours, curve, atol=ATOL)


# ---------------------------------------------------------------- what it is given


@pytest.mark.parametrize("give", [list, iter, tuple])
def test_samples_in_memory_are_those_of_the_file(
    case: Case,
    found: boundary.Calibrated,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    give: Callable[[list[dict[str, str]]], object],
) -> None:
    again = boundary.calibrate(
        model,
        tokenizer,
        give(records_of(case)),
        CalibrationOptions(diagnostics=False),  # type: ignore[arg-type]
    )
    assert again.record is not None
    assert found.record is not None
    assert again.record.data_fingerprint == found.record.data_fingerprint
    assert np.array_equal(again.calibration.scores, found.calibration.scores)


def test_a_model_in_training_is_measured_without_dropout_and_trains_on(
    case: Case, found: boundary.Calibrated, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = AutoModelForCausalLM.from_pretrained(case.model)
    config = LoraConfig.from_pretrained(case.adapter)
    config.lora_dropout = 0.5
    with expected_peft_warnings():
        model = PeftModel.from_pretrained(base, case.adapter, config=config, is_trainable=True)
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable()
    untouched = Untouched(model.eval())
    model.train()
    model.base_model.model.lm_head.eval()  # one module is not
    again = boundary.calibrate(
        model, tokenizer, case.data, CalibrationOptions(diagnostics=False), num_shown=1
    )
    assert np.array_equal(again.calibration.scores, found.calibration.scores)
    assert [m for m in model.modules() if not m.training] == [model.base_model.model.lm_head]
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    model.eval()
    for handle in list(model.base_model.model.get_input_embeddings()._forward_hooks):
        del model.base_model.model.get_input_embeddings()._forward_hooks[handle]
    untouched.check()


def test_progress_is_told_and_it_can_be_stopped(
    case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    told: list[Progress] = []
    with pytest.raises(Stopped):
        boundary.calibrate(
            model, tokenizer, case.data, on_progress=told.append,
            should_stop=lambda: any(progress.stage == "controls" for progress in told),
        )  # fmt: skip
    assert {"score", "choose", "norms"} <= {progress.stage for progress in told}
    assert traces(model) == []


def test_a_bfloat16_model_has_the_same_names(
    case: Case, found: boundary.Calibrated, tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.bfloat16)
    with expected_peft_warnings():
        model = PeftModel.from_pretrained(base, adapter).to(torch.bfloat16).eval()
    options = CalibrationOptions(diagnostics=False, num_random_masks=0)
    half = boundary.calibrate(model, tokenizer, case.data, options, num_shown=0)
    assert half.record is not None
    assert found.record is not None
    assert half.record.base_fingerprint == found.record.base_fingerprint
    assert half.record.adapter_fingerprint != found.record.adapter_fingerprint
    written = record.read(half.save(adapter))
    assert written.adapter_fingerprint == found.record.adapter_fingerprint


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.base_model.disable_adapter_layers(), "switched off"),
        (lambda model: model.base_model.set_adapter(["default", "other"]), "'default', 'other'"),
        (lambda model: model.merge_adapter(), "merged"),
    ],
)
def test_an_adapter_that_is_not_plainly_active_is_refused(
    case: Case,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    spoil: Callable[[PeftModel], object],
    message: str,
) -> None:
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    spoil(model)
    with pytest.raises(ValueError, match=message):
        boundary.calibrate(model, tokenizer, case.data)


def test_inside_a_depth_nothing_is_calibrated(
    case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with (
        boundary.lora_depth(model, 1),
        pytest.raises(ValueError, match="switched off"),
    ):
        boundary.calibrate(model, tokenizer, case.data)


def test_what_does_not_go_together_is_refused(
    case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    def calibrate(samples: object, **options: object) -> None:
        boundary.calibrate(model, tokenizer, samples, **options)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="PeftModel"):
        boundary.calibrate(model.get_base_model(), tokenizer, case.data)  # type: ignore[arg-type]
    with pytest.raises(dataset.DatasetError, match="line 1: 'answer' is no field"):
        calibrate([{"prompt": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="takes no pattern"):
        calibrate(case.data, pattern="(.*)")
    with pytest.raises(ValueError, match="prompt of line 1 leaves room for"):
        calibrate(case.data, max_tokens=256)
    with pytest.raises(ValueError, match="positive, got 0"):
        calibrate(case.data, max_tokens=0)
    with pytest.raises(ValueError, match="unknown metric"):
        calibrate(case.data, options=CalibrationOptions(metric="taste"))
    with pytest.raises(ValueError, match="needs completions"):
        calibrate([{"prompt": "a"}])


# ---------------------------------------------------------------- what comes of it


def test_a_saved_record_is_believed_by_the_server(
    case: Case, adapter: Path, found: boundary.Calibrated, fathom: Run
) -> None:
    assert served_depth(fathom, case, adapter) is None
    assert found.save(adapter) == adapter / "boundary.json"
    assert served_depth(fathom, case, adapter) == found.depth
    # Negative control: of other weights it is not.
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    assert served_depth(fathom, case, adapter) is None


def test_a_record_before_its_weights_fits_what_peft_saves(
    case: Case, found: boundary.Calibrated, model: PeftModel, fathom: Run, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    found.save(tmp_path / "new" / "boundary.json")
    model.save_pretrained(tmp_path / "new")
    assert served_depth(fathom, case, tmp_path / "new") == found.depth


def test_weights_that_were_cast_when_saved_are_known_again(
    case: Case, adapter: Path, tokenizer: PreTrainedTokenizerBase, fathom: Run
) -> None:
    """PEFT reads bfloat16 as float32; the server reads the file."""
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file)
    cast = Case(case.model, adapter, case.data, case.test)
    options = CalibrationOptions(diagnostics=False, num_random_masks=0)
    found = boundary.calibrate(plain_peft(cast), tokenizer, case.data, options, num_shown=0)
    found.save(adapter)
    assert served_depth(fathom, case, adapter) == found.depth


def scaled(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def changed(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, file)


def fewer(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)


@pytest.mark.parametrize(
    ("spoil", "why"), [(scaled, "scaling"), (changed, "differs"), (fewer, "other tensors")]
)
def test_nothing_is_saved_beside_another_adapter(
    adapter: Path, found: boundary.Calibrated, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(adapter)
    card = (adapter / "README.md").read_bytes()
    for save in (found.save, found.update_card):
        with pytest.raises(RecordError, match=f"not the one that was calibrated: .*{why}"):
            save(adapter)
    assert not (adapter / "boundary.json").exists()
    assert (adapter / "README.md").read_bytes() == card


def test_a_base_from_nowhere_makes_no_record(case: Case, tmp_path: Path) -> None:
    base = build_model(BY_NAME["llama"])
    with expected_peft_warnings():
        model = PeftModel.from_pretrained(base, case.adapter).eval()
    found = boundary.calibrate(model, byte_tokenizer(), case.data, num_shown=0)
    assert found.record is None
    assert "made in memory" in repr(found)
    assert "made in memory" in found._repr_html_()
    with pytest.raises(RecordError, match="made in memory"):
        found.save(tmp_path)
    named = boundary.calibrate(model, byte_tokenizer(), case.data, base=case.model, num_shown=0)
    assert named.record is not None


def test_too_few_samples_make_no_record(
    case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = boundary.calibrate(model, tokenizer, case.data, max_samples=5)
    assert (found.verdict, found.depth) == ("too_few", NUM_LAYERS)
    assert "no record: too few samples" in repr(found)
    assert "<table>" in found._repr_html_()
    with pytest.raises(RecordError, match="too few"):
        found.save(tmp_path)


def test_keep_full_takes_no_confirmed_depth_back(
    case: Case,
    adapter: Path,
    found: boundary.Calibrated,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    found.save(adapter)
    found.save(adapter)  # a confirmed depth may be confirmed again
    strict = CalibrationOptions(confidence=0.999999, diagnostics=False, num_random_masks=0)
    others = write_samples(tmp_path / "others.jsonl", 40, 9)
    kept = boundary.calibrate(plain_peft(case), tokenizer, others, strict, num_shown=0)
    assert kept.verdict == "keep_full"
    with pytest.raises(RecordError, match="overwrite=True"):
        kept.save(adapter)
    assert record.read(adapter / "boundary.json").depth == found.depth
    kept.save(adapter, overwrite=True)
    assert record.read(adapter / "boundary.json").depth == NUM_LAYERS


def test_it_is_shown_in_a_cell(found: boundary.Calibrated) -> None:
    lines = repr(found).splitlines()
    assert lines[0].startswith(f"noisy: Depth {found.depth} of {NUM_LAYERS} scores higher")
    assert [line.split()[0] for line in lines[2:] if ">" in line] == [">"]
    assert len(lines) == 2 + 1 + NUM_LAYERS + 1
    html = found._repr_html_()
    assert 'src="data:image/svg+xml;base64,' in html
    assert html.count("<tr>") == 1 + NUM_LAYERS + 1
    assert "<script" not in html


def test_a_strangers_name_is_only_shown(
    case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    options = CalibrationOptions(diagnostics=False, num_random_masks=0)
    name = "<b>\x1b[31m"
    found = boundary.calibrate(model, tokenizer, case.data, options, name=name, num_shown=0)
    assert "<b>\\x1b" not in found._repr_html_()
    assert "&lt;b&gt;\\x1b" in found._repr_html_()
    assert "\x1b" not in repr(found)


def test_the_report_is_written(found: boundary.Calibrated, tmp_path: Path) -> None:
    page = found.write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "curve.svg", "report.json"}
    assert "`noisy`" in page.read_text()
