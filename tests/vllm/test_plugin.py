"""What installing the plugin adds to a vLLM, and what it does there before anybody asks."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.vllm.overlay import Overlay
from tests.vllm.site import Site

LOAD = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.lora.resolver import LoRAResolverRegistry
print(sorted(LoRAResolverRegistry.get_supported_resolvers()))
"""


def run(overlay: Overlay, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Some code in vLLM's environment."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(overlay.python), "-P", "-c", code],
        env=inherited | overlay.variables | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def load_plugins(overlay: Overlay, **variables: str) -> subprocess.CompletedProcess[str]:
    """Vllm's own loading of plugins, as in each of its processes."""
    return run(overlay, LOAD, **variables)


def test_vllms_environment_gains_three_packages(overlay: Overlay) -> None:
    """Whatever else came would stand before what vLLM was tested with."""
    (site_packages,) = overlay.python.parents[1].glob("lib/python3*/site-packages")
    found = {path.name.partition("-")[0] for path in site_packages.glob("*.dist-info")}
    assert found - {"pip", "setuptools"} == {"fathom_lora", "peft", "accelerate", "vllm"}


def test_the_resolver_is_there_where_a_root_is_named(overlay: Overlay, site: Site) -> None:
    named = {
        "FATHOM_VLLM_ADAPTER_ROOT": str(site.root),
        "FATHOM_VLLM_CACHE_DIR": str(site.cache),
    }
    done = load_plugins(overlay, **named, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")
    assert done.stdout.splitlines()[-1] == "['Fathom']", done.stderr
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING is not set" not in done.stdout + done.stderr
    done = load_plugins(overlay, **named)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING is not set" in done.stdout + done.stderr
    assert load_plugins(overlay).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["FATHOM_VLLM_ADAPTER_ROOT", "FATHOM_VLLM_DEFAULT_DEPTH"])
def test_a_bad_variable_stops_vllm_with_its_name(overlay: Overlay, site: Site, name: str) -> None:
    good = {"FATHOM_VLLM_ADAPTER_ROOT": str(site.root)}
    done = load_plugins(overlay, **good | {name: "/nowhere"})
    assert done.returncode != 0
    assert f"{name}: " in done.stderr


FULL = """
import asyncio
from vllm.entrypoints.serve import create_error_response
from server.vllm.resolver import DepthResolver
from server.vllm.settings import load

async def ask():
    resolver = DepthResolver(load())
    for name in ("a", "b"):
        assert (await resolver.resolve_lora({base!r}, name)).lora_path
    try:
        await resolver.resolve_lora({base!r}, "moving")
    except Exception as error:
        answer = create_error_response(error).error
        print(answer.code, answer.message)

asyncio.run(ask())
"""


def test_a_full_cache_is_a_503_in_words(overlay: Overlay, site: Site, tmp_path: Path) -> None:
    """Vllm's own rule for what becomes of an exception; two cuts are held, a third has no room."""
    limit = 1 << 20
    num_bytes = sum(path.stat().st_size for path in site.adapter("a").iterdir())
    assert 2 * num_bytes < limit < 3 * num_bytes
    named = {
        "FATHOM_VLLM_ADAPTER_ROOT": str(site.root),
        "FATHOM_VLLM_CACHE_DIR": str(tmp_path / "cache"),
        "FATHOM_VLLM_MAX_CACHE_BYTES": str(limit),
    }
    done = run(overlay, FULL.format(base=str(site.base)), **named)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("503 moving: the cache of cut adapters is full")
