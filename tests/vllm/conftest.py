"""One vLLM for all tests here: it takes a minute to start. Settings of the run are variables:

PEERS: where `make bench-peers` has its environments; default is build/peers.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.oracle import Oracle
from tests.vllm.overlay import CHECKOUT, Overlay, make_overlay
from tests.vllm.site import NUM_LAYERS, Served, Site, make_site, serve

EXPORTED = (2, NUM_LAYERS)


@pytest.fixture(scope="session")
def overlay() -> Overlay:
    peers = Path(os.environ.get("PEERS") or CHECKOUT / "build" / "peers").absolute()
    return make_overlay(peers, CHECKOUT / "build" / "vllm" / "env")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def oracle(site: Site) -> Oracle:
    return Oracle(site.base)


@pytest.fixture(scope="session")
def exported(site: Site) -> dict[str, Path]:
    """What `fathom export` writes, by the name that vLLM is to serve it under."""
    found: dict[str, Path] = {}
    for depth in EXPORTED:
        # A slash in a name of vLLM's own: the plugin has names with one, too.
        out = found[f"exported/v{depth}"] = site.directory / f"exported-{depth}"
        command = [sys.executable, "-m", "server", "export", str(site.adapter("a"))]
        command += ["--depth", str(depth), "--model", str(site.base), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True)
    return found


@pytest.fixture(scope="session")
def vllm(site: Site, overlay: Overlay, exported: dict[str, Path]) -> Iterator[Served]:
    # A test run that is told to end would leave vLLM behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serve(site, overlay, exported) as served:
        yield served
