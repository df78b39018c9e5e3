"""`fathom export`: which depth, on whose word, what is refused, and what is printed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from boundary import record
from boundary.depth import lora_depth
from server.export import layer_ranges
from server.model import loader
from server.model.checkpoint import read_checkpoint
from tests.conftest import Run
from tests.parity.adapters import expected_peft_warnings, save_adapter
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model
from tests.tiny import Tiny


@pytest.fixture
def export(fathom: Run) -> Run:
    """Run `fathom export` in this process; returns status, stdout and stderr."""
    return lambda *arguments: fathom("export", *map(str, arguments))


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.adapter("a"), tmp_path / "adapter"))


def pin(tiny: Tiny, adapter: Path, depth: int, **fields: object) -> record.BoundaryRecord:
    """Write the record that a calibration of this adapter on the tiny model would leave."""
    base = loader.load(str(tiny.model_path), None, "auto", "auto")
    made = record.BoundaryRecord.pinned(
        depth,
        NUM_LAYERS,
        "for a test",
        base=base.revision,
        adapter=read_checkpoint(adapter, tiny.targets).digest,
    ).model_copy(update=fields)
    record.write(made, adapter / record.FILE_NAME)
    return made


@torch.no_grad()
def logits(adapter: Path, depth: int) -> torch.Tensor:
    with expected_peft_warnings():
        model = PeftModel.from_pretrained(build_model(BY_NAME["llama"]), str(adapter)).eval()
    with lora_depth(model, depth):
        return model(input_ids=torch.arange(8)[None]).logits


def test_a_number_needs_no_model(export: Run, adapter: Path, tmp_path: Path) -> None:
    status, out, err = export(adapter, "--depth", 2, "--out", tmp_path / "cut", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    before, after = (
        (path / "adapter_model.safetensors").stat().st_size for path in (adapter, tmp_path / "cut")
    )
    assert report == {
        "adapter": str(adapter),
        "path": str(tmp_path / "cut"),
        "depth": 2,
        "depth_from": "--depth",
        "num_layers": NUM_LAYERS,
        "num_layers_from": "the adapter's highest layer; the model may have more",
        "layers_kept": [0, 1],
        "layers_dropped": [2, 3],
        "num_tensors_before": 56,
        "num_tensors_after": 28,
        "num_bytes_before": before,
        "num_bytes_after": after,
        "num_bytes_saved": before - after,
        "percent_saved": pytest.approx(50, abs=1),
        "notes": [],
    }
    cut = tmp_path / "cut"
    assert torch.equal(logits(cut, NUM_LAYERS), logits(adapter, 2))
    assert not torch.equal(logits(cut, NUM_LAYERS), logits(adapter, 3))


def test_the_report_can_be_read(export: Run, tiny: Tiny, adapter: Path, tmp_path: Path) -> None:
    (adapter / record.FILE_NAME).write_text("not read where --model tells the number of layers")
    arguments = ("--depth", 1, "--out", tmp_path / "cut", "--model", tiny.model_path)
    status, out, _ = export(adapter, *arguments)
    assert status == 0
    lines = {line.split("  ")[0].strip(): " ".join(line.split()) for line in out.splitlines()}
    assert lines["depth"] == "depth 1 of 4 depth from --depth"
    assert "number of layers from the model" in out
    assert lines["layers kept"] == "layers kept 0"
    assert lines["layers dropped"] == "layers dropped 1-3"
    assert lines["tensors"] == "tensors 56 -> 14"
    assert "bytes saved, 7" in lines["weights"]
    assert "boundary.json is not copied" in out
    assert f"written: {tmp_path / 'cut'}" in out
    assert sorted(os.listdir(tmp_path / "cut")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_full_copies_the_whole_adapter(export: Run, adapter: Path, tmp_path: Path) -> None:
    status, out, _ = export(adapter, "--depth", "full", "--out", tmp_path / "cut", "--json")
    assert status == 0
    assert json.loads(out)["num_bytes_saved"] == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (adapter / name).read_bytes()


def test_the_number_of_layers_is_the_models_then_the_records(
    export: Run, tiny: Tiny, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(tiny.adapter("shallow"), tmp_path / "adapter"))
    arguments = (adapter, "--depth", 4, "--json", "--out")
    status, _, err = export(*arguments, tmp_path / "a")
    assert (status, err) == (
        2,
        "fathom: --depth: must be from 1 to 3, the highest layer with LoRA; the model may have more,"
        " got 4\n",
    )
    pin(tiny, adapter, 2)
    status, out, _ = export(*arguments, tmp_path / "b")
    assert (status, json.loads(out)["num_layers_from"]) == (0, "boundary.json")
    status, out, _ = export(*arguments, tmp_path / "c", "--model", tiny.model_path)
    assert (status, json.loads(out)["num_layers_from"]) == (0, "the model")


def test_auto_takes_the_depth_of_a_record_that_fits(
    export: Run, tiny: Tiny, adapter: Path, tmp_path: Path
) -> None:
    pin(tiny, adapter, 3)
    arguments = ("--depth", "auto", "--out", tmp_path / "cut", "--model", tiny.model_path)
    status, out, _ = export(adapter, *arguments, "--json")
    assert status == 0
    report = json.loads(out)
    assert (report["depth"], report["depth_from"]) == (3, "boundary.json")
    assert report["notes"] == [
        "boundary.json is not copied: it is about the whole adapter's content"
    ]
    assert torch.equal(logits(tmp_path / "cut", NUM_LAYERS), logits(adapter, 3))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"adapter_fingerprint": "sha256:0000"}, "made for adapter content sha256:0000, loaded is"),
        ({"base_fingerprint": "sha256:0000"}, "made for base model sha256:0000, loaded is"),
        ({"num_layers": 5}, "made for 5 layers, the model has 4"),
    ],
)
def test_auto_refuses_a_record_about_something_else(
    export: Run, tiny: Tiny, adapter: Path, tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    pin(tiny, adapter, 3, **fields)
    arguments = ("--depth", "auto", "--out", tmp_path / "cut", "--model", tiny.model_path)
    status, out, err = export(adapter, *arguments)
    assert (status, out) == (1, "")
    assert f"boundary.json is not about this adapter on this model: {reason}" in err
    assert not (tmp_path / "cut").exists()


def test_auto_refuses_a_record_of_weights_that_have_changed(
    export: Run, tiny: Tiny, adapter: Path, tmp_path: Path
) -> None:
    pin(tiny, adapter, 3)
    shutil.copy(tiny.adapter("b") / "adapter_model.safetensors", adapter)
    arguments = ("--depth", "auto", "--out", tmp_path / "cut", "--model", tiny.model_path)
    status, _, err = export(adapter, *arguments)
    assert status == 1
    assert "made for adapter content" in err


def test_auto_refuses_what_it_cannot_cut_at(
    export: Run, tiny: Tiny, adapter: Path, tmp_path: Path
) -> None:
    arguments = (adapter, "--depth", "auto", "--out", tmp_path / "cut")
    status, _, err = export(*arguments)
    assert status == 2
    assert "--depth: auto needs --model" in err
    arguments = (*arguments, "--model", tiny.model_path)
    status, _, err = export(*arguments)
    assert status == 1
    assert "boundary.json is missing beside the adapter" in err
    pin(tiny, adapter, 0)
    status, _, err = export(*arguments)
    assert status == 1
    assert "boundary.json says depth 0, the base model" in err
    (adapter / record.FILE_NAME).write_text("{}")
    status, _, err = export(*arguments)
    assert status == 1
    assert "fathom: 'boundary.json':" in err
    assert not (tmp_path / "cut").exists()


def test_a_place_that_is_taken_is_known_before_a_model_is_loaded(
    export: Run, adapter: Path, tmp_path: Path
) -> None:
    status, _, err = export(adapter, "--depth", "auto", "--out", adapter, "--model", tmp_path)
    assert status == 2  # 1 if the model, which is none, had been looked at
    assert "--out" in err


@pytest.mark.parametrize("word", ["", "deep", "1.5", "2,3", "FULL", "٢", "9" * 5000, "1e3", "0x2"])
def test_a_word_that_is_no_depth_is_refused(
    export: Run, adapter: Path, tmp_path: Path, word: str
) -> None:
    status, out, err = export(adapter, f"--depth={word}", "--out", tmp_path / "cut")
    assert (status, out) == (2, "")
    assert "--depth" in err
    assert len(err) < 200
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--depth", "0", "--out", "cut"], 2, "--depth: 0 is the base model"),
        (["--depth", "99", "--out", "cut"], 2, "--depth: must be from 1 to 4"),
        (["--depth", "2", "--out", "adapter"], 2, "is not empty"),
        (["--depth", "2", "--out", "adapter/README.md/x"], 2, "is not a directory"),
        (["--depth", "2", "--out", "link"], 2, "symbolic link"),
        (["--depth", "2"], 2, "--out"),
        (["--out", "cut"], 2, "--depth"),
        (["--depth", "2", "--out", "cut", "--force"], 2, "--force"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    export: Run,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("adapter")
    before = sorted(tmp_path.rglob("*"))
    found, out, err = export("adapter", *arguments)
    assert (found, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_newlora": True}, "use_newlora"),
        ({"r": -1}, "r: "),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_the_server_refuses_is_refused(
    export: Run, adapter: Path, tmp_path: Path, fields: dict[str, object], culprit: str
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    status, _, err = export(adapter, "--depth", 2, "--out", tmp_path / "cut")
    assert status == 1
    assert culprit in err
    assert not (tmp_path / "cut").exists()


def test_weights_that_are_cut_off_are_refused(export: Run, adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    status, _, err = export(adapter, "--depth", 2, "--out", tmp_path / "cut")
    assert (status, err.count("\n")) == (1, 1)
    assert "adapter_model.safetensors cannot be read" in err


def test_an_adapter_that_is_not_there_is_refused(export: Run, tmp_path: Path) -> None:
    status, _, err = export(tmp_path / "nowhere", "--depth", 2, "--out", tmp_path / "cut")
    assert (status, err) == (1, "fathom: adapter_config.json is missing\n")


def test_a_head_needs_the_model_where_the_adapter_does_not_reach_the_top(
    export: Run, tiny: Tiny, tmp_path: Path
) -> None:
    adapter = save_adapter(BY_NAME["llama"], "lm_head_and_low_layers", tmp_path / "adapter")
    arguments = (adapter, "--depth", 2, "--out", tmp_path / "cut")
    status, _, err = export(*arguments)
    assert status == 1
    assert "if 2 is full depth (no --model is named)" in err
    status, out, _ = export(*arguments, "--model", tiny.model_path, "--json")
    assert (status, json.loads(out)["num_tensors_after"]) == (0, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "resnet"}', "does not say how many layers there are"),
        ('{"model_type": "no such thing"}', "no model could be read at"),
        ("{", "no model could be read at"),
        (None, "no model could be read at"),
    ],
)
def test_a_model_that_does_not_tell_its_layers_is_refused(
    export: Run, adapter: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    (tmp_path / "model").mkdir()
    if content is not None:
        (tmp_path / "model" / "config.json").write_text(content)
    arguments = ("--depth", 2, "--out", tmp_path / "cut", "--model", tmp_path / "model")
    status, _, err = export(adapter, *arguments)
    assert status == 1
    assert message in err
    assert not (tmp_path / "cut").exists()


def test_layers_are_shown_as_ranges() -> None:
    assert layer_ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert layer_ranges(()) == "none"
