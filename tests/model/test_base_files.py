"""A base model's name from its files alone is the one that a loaded model has, or none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import ModelError
from server.model import loader
from server.model.base_files import revision_of_files
from tests.parity.zoo import BY_NAME, save_model

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_tell_what_the_loaded_model_tells(tmp_path: Path, name: str, dtype: str) -> None:
    path = save_model(BY_NAME[name], tmp_path)
    assert revision_of_files(str(path)) == loader.load(str(path), None, "cpu", dtype).revision


def test_a_model_in_several_files_is_the_same(tmp_path: Path) -> None:
    path = save_model(BY_NAME["llama"], tmp_path)
    before = revision_of_files(str(path))
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    weight_map = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == part}, path / part)
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert revision_of_files(str(path)) == before


def test_other_weights_are_another(tmp_path: Path) -> None:
    path = save_model(BY_NAME["llama"], tmp_path)
    before = revision_of_files(str(path))
    tensors = load_file(path / WEIGHTS)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    assert revision_of_files(str(path)) != before


def test_tensors_that_transformers_renames_have_no_name(tmp_path: Path) -> None:
    path = save_model(BY_NAME["gpt_neox"], tmp_path)
    with pytest.raises(ModelError, match=r"no tensor 'lm_head\.weight'"):
        revision_of_files(str(path))


def test_what_the_files_do_not_tell_has_no_name(tmp_path: Path) -> None:
    path = save_model(BY_NAME["llama"], tmp_path)
    tensors = load_file(path / WEIGHTS)
    renamed = {name.replace("model.norm", "model.other"): t for name, t in tensors.items()}
    save_file(renamed, path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor 'model\.norm\.weight'"):
        revision_of_files(str(path))
    wide = tensors | {"model.norm.weight": torch.ones(65)}
    save_file(wide, path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="another shape"):
        revision_of_files(str(path))
    (path / WEIGHTS).write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read"):
        revision_of_files(str(path))
