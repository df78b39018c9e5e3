"""The plugin's variables: what they mean, and that a bad one stops vLLM by its name."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from server.config import ConfigError
from server.environment import default_cache, load_settings
from server.vllm import plugin
from server.vllm.settings import load

UNNEEDED = ("vllm", "torch", "transformers", "peft", "fastapi", "structlog", "cyclopts")


def given(tmp_path: Path, **changes: str) -> dict[str, str]:
    (tmp_path / "adapters").mkdir(exist_ok=True)
    return {
        "FATHOM_VLLM_ADAPTER_ROOT": str(tmp_path / "adapters"),
        "FATHOM_VLLM_CACHE_DIR": str(tmp_path / "made" / "cuts"),
    } | changes


def test_a_root_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(given(tmp_path))
    assert found is not None
    assert (found.default_depth, found.max_cache_bytes) == ("auto", 16 << 30)
    assert (tmp_path / "made" / "cuts").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_cache("cuts") == tmp_path / "cache" / "fathom" / "cuts"


def test_every_variable_counts(tmp_path: Path) -> None:
    changes = {
        "FATHOM_VLLM_DEFAULT_DEPTH": "full",
        "FATHOM_VLLM_MAX_CACHE_BYTES": "512MiB",
    }
    found = load(given(tmp_path, **changes))
    assert found is not None
    assert (found.default_depth, found.max_cache_bytes) == ("full", 512 << 20)


def test_without_any_of_them_there_is_nothing_to_do() -> None:
    assert load({"FATHOM_MODEL": "x", "VLLM_PLUGINS": "fathom"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FATHOM_VLLM_ADAPTER_ROOT": "/nowhere/at/all"}, "FATHOM_VLLM_ADAPTER_ROOT: .*directory"),
        ({"FATHOM_VLLM_DEFAULT_DEPTH": "12"}, "FATHOM_VLLM_DEFAULT_DEPTH: .*'auto' or 'full'"),
        ({"FATHOM_VLLM_MAX_CACHE_BYTES": "much"}, "FATHOM_VLLM_MAX_CACHE_BYTES: .*bytes"),
        ({"FATHOM_VLLM_MAX_CACHE_BYTES": "5"}, "FATHOM_VLLM_MAX_CACHE_BYTES: "),
        ({"FATHOM_VLLM_CACHE_DIR": "/proc/cuts"}, "FATHOM_VLLM_CACHE_DIR: cannot be made"),
        ({"FATHOM_VLLM_ROOT": "x"}, "FATHOM_VLLM_ROOT: is no setting"),
    ],
)
def test_a_bad_value_is_an_error_with_its_name(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(given(tmp_path, **changes))


def test_a_variable_without_a_root_is_an_error() -> None:
    with pytest.raises(ConfigError, match="FATHOM_VLLM_ADAPTER_ROOT: is needed"):
        load({"FATHOM_VLLM_DEFAULT_DEPTH": "full"})


def test_a_fathom_server_in_the_same_environment_does_not_mind() -> None:
    environ = {"FATHOM_VLLM_ADAPTER_ROOT": "/adapters", "FATHOM_PORT": "1"}
    assert load_settings(environ=environ).port == 1
    with pytest.raises(ConfigError, match="FATHOM_VLM_ADAPTER_ROOT"):
        load_settings(environ={"FATHOM_VLM_ADAPTER_ROOT": "/adapters"})


@pytest.mark.skipif(
    "EXPECT_WHEEL" not in os.environ, reason="`make test` sets it: what runs is the built wheel"
)
def test_vllm_finds_the_plugin() -> None:
    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "fathom")
    assert found.load() is plugin.register


def test_without_a_root_vllm_starts_as_ever() -> None:
    """It calls this in every process of every vLLM that has Fathom installed."""
    code = (
        "import sys; from server.vllm.plugin import register; register();"
        f"print([name for name in {UNNEEDED} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={}
    )
    assert done.stdout.strip() == "[]"
