"""Which library is loaded, and what happens where there is none that fits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.config import Settings
from server.model import prepare
from server.model.native import library
from server.model.native import step as native
from server.model.native.library import Library
from server.model.native.step import NativeStep
from server.model.sdpa import AttentionStep
from tests.parity.zoo import BY_NAME, save_model


@pytest.fixture(autouse=True)
def _forget_what_was_loaded() -> Iterator[None]:
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def test_this_processors_library_was_compiled_and_has_torchs_threads() -> None:
    found = library.load()
    assert isinstance(found, Library), found
    assert found.has_team


def test_each_level_that_is_compiled_has_its_word_in_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []
    for capability in ("DEFAULT", "AVX2", "AVX512"):
        if capability == "AVX512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            continue  # loading it is harmless, but then it would not be told what runs here
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        library.load.cache_clear()
        found = library.load()
        assert isinstance(found, Library), found
        loaded.append(found.level)
    assert loaded == ["x86-64", "x86-64-v3", "x86-64-v4"][: len(loaded)]


def test_another_processor_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.platform, "machine", lambda: "riscv64")
    assert library.load() == "no kernels were compiled for riscv64 when Fathom was installed"


def test_a_library_from_other_sources_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.SIZES, "fathom_sizeof_lora", 8)
    found = library.load()
    assert isinstance(found, str)
    assert "was compiled from other sources: install Fathom again" in found


def test_a_file_that_is_no_library_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("kernels-x86-64.so", "kernels-x86-64-v3.so", "kernels-x86-64-v4.so"):
        (tmp_path / name).write_bytes(b"not ELF")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    found = library.load()
    assert isinstance(found, str)
    assert "cannot be loaded" in found


@pytest.mark.parametrize("reason", [None, "no kernels were compiled"])
def test_a_model_is_served_with_or_without(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if reason is not None:
        monkeypatch.setattr(native, "load", lambda: reason)
    save_model(BY_NAME["llama"], tmp_path)
    settings = Settings(model=str(tmp_path), device="cpu", kv_cache_bytes=1 << 20)
    prepared = prepare.prepare(settings)
    expected = NativeStep if reason is None else AttentionStep
    assert prepared.runner._layout is expected
