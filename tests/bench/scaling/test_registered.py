"""Starts with many adapters, told by what was opened; never by how long they took."""

from pathlib import Path

import pytest
import torch

from server.bench.random_model import save_random_adapter, save_random_model
from server.bench.scaling.registered import (
    files_opened,
    link_adapters,
    measure_start,
    write_config,
)
from server.bench.shape import parse_shape
from server.model.checkpoint import read_checkpoint
from server.model.loader import load
from server.model.targets import Targets

SHAPE = parse_shape("2x32:vocab=100:positions=64")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("saved")
    model, adapter = directory / "model", directory / "adapter-of-all"
    save_random_model(SHAPE, model, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    save_random_adapter(SHAPE, adapter, rank=2, seed=1, base=model)
    return model, adapter


@pytest.mark.parametrize("number", [20, 60])
def test_below_the_root_nothing_is_opened_before_it_is_asked_for(
    saved: tuple[Path, Path], tmp_path: Path, number: int
) -> None:
    model, adapter = saved
    link_adapters(adapter, tmp_path / "root", number)
    write_config(model, "root", tmp_path / "root", number, tmp_path / "config.toml")
    found = measure_start(tmp_path / "config.toml")
    assert found.num_files == 0
    assert found.num_listed == 16  # those that were asked for


@pytest.mark.parametrize("number", [20, 60])
def test_named_ones_have_two_headers_opened_and_are_all_listed(
    saved: tuple[Path, Path], tmp_path: Path, number: int
) -> None:
    model, adapter = saved
    link_adapters(adapter, tmp_path / "root", number)
    write_config(model, "named", tmp_path / "root", number, tmp_path / "config.toml")
    found = measure_start(tmp_path / "config.toml")
    # Sixteen are read. The others are of one recipe: proved once, then only compared.
    assert found.num_files == 2 * number + 4
    assert found.num_listed == number


def test_opened_files_are_noted_only_while_asked(saved: tuple[Path, Path]) -> None:
    model, adapter = saved
    targets = Targets(load(str(model), None, "cpu", "float32").model)
    with files_opened() as opened:
        read_checkpoint(adapter, targets)
    assert [path.name for path in opened] == ["adapter_config.json", "adapter_model.safetensors"]
    read_checkpoint(adapter, targets)
    assert len(opened) == 2
