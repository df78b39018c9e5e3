"""Outlines say what checkpoints say, read no weight, and parse equal headers once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from server.errors import AdapterError
from server.model.adapter_config import AdapterConfig
from server.model.checkpoint import read_checkpoint
from server.model.outline import OutlineReader, read_outline
from tests.tiny import ADAPTERS, Tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories whose config was parsed."""
    seen: list[Path] = []
    read = AdapterConfig.read.__func__  # type: ignore[attr-defined]

    def note(cls: Any, directory: Path) -> Any:
        seen.append(directory)
        return read(cls, directory)

    monkeypatch.setattr(AdapterConfig, "read", classmethod(note))
    return seen


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_an_outline_is_what_reading_says(tiny: Tiny, name: str) -> None:
    outline = read_outline(tiny.adapter(name), tiny.targets)
    checkpoint = read_checkpoint(tiny.adapter(name), tiny.targets)
    for field in ("rank", "max_depth", "num_bytes"):
        assert getattr(outline, field) == getattr(checkpoint, field)


def test_adapters_of_one_recipe_are_parsed_once(
    tiny: Tiny, tmp_path: Path, parsed: list[Path]
) -> None:
    """`a` and `b` differ in their weights only; a comment in the config is another recipe."""
    reader = OutlineReader(tiny.targets)
    first = reader.read(tiny.adapter("a"))
    assert reader.read(tiny.adapter("b")) == first
    assert parsed == [tiny.adapter("a")]
    assert reader.read(tiny.adapter("shallow")) != first
    assert reader.read(tiny.adapter("b")) == first
    other = shutil.copytree(tiny.adapter("a"), tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    assert reader.read(other) == first
    assert parsed == [tiny.adapter("a"), tiny.adapter("shallow"), other]


def test_what_differs_is_judged_by_itself(tiny: Tiny, tmp_path: Path) -> None:
    """The same header over fewer bytes, another shape, another file: each is refused for what it is."""
    reader = OutlineReader(tiny.targets)
    reader.read(tiny.adapter("a"))
    cut = shutil.copytree(tiny.adapter("a"), tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-4])
    wide = shutil.copytree(tiny.adapter("a"), tmp_path / "wide")
    tensors = load_file(wide / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name].repeat(1, 2)}, wide / WEIGHTS)
    gone = shutil.copytree(tiny.adapter("a"), tmp_path / "gone")
    (gone / WEIGHTS).rename(gone / "adapter_model.bin")
    for directory, message in ((cut, "it is truncated"), (wide, "has shape"), (gone, "pickle")):
        for _ in range(2):
            with pytest.raises(AdapterError, match=message):
                reader.read(directory)


def test_files_that_change_meanwhile_teach_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what one adapter shows would be believed of all with the bytes that it had before."""
    busy = shutil.copytree(tiny.adapter("a"), tmp_path / "busy")
    reader = OutlineReader(tiny.targets)

    def swapped(path: Path, targets: Any, *more: Any) -> Any:
        shutil.copytree(tiny.adapter("shallow"), path, dirs_exist_ok=True)
        return read_outline(path, targets, *more)

    monkeypatch.setattr("server.model.outline.read_outline", swapped)
    assert reader.read(busy) == read_outline(tiny.adapter("shallow"), tiny.targets)
    monkeypatch.undo()
    assert reader.read(tiny.adapter("a")) == read_outline(tiny.adapter("a"), tiny.targets)
