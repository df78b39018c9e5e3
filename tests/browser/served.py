"""A real `fathom serve` with the demo, on a port of its own, so that it can come back there."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from server import demo

API_KEY = "key-of-a-client"
ADMIN_KEY = "key-of-an-operator"
START_S = 120
STOP_S = 60


@dataclass(frozen=True, slots=True)
class Site:
    """What a server is started with: folders that outlive it, and its port."""

    root: Path
    """Adapters that may be loaded: a good one, and one whose weights are cut off."""
    database: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def make_site(directory: Path) -> Site:
    root = directory / "adapters"
    for name in ("second", "broken"):
        shutil.copytree(demo.adapters()["pirate"], root / name)
    weights = root / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return Site(root, directory / "fathom.db", port)


@contextmanager
def serve(site: Site, log: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start and wait until it is ready; ended, by its own id, on the way out."""
    command = [sys.executable, "-m", "server", "serve", "--port", str(site.port)]
    command += ["--adapter-root", str(site.root), "--database", f"sqlite:///{site.database}"]
    command += ["--log-level", "warning", "--drain-timeout-s", "0.5", *arguments]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FATHOM_")}
    with (
        log.open("a", encoding="utf-8") as stderr,
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            env=environ | {"OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            _wait(site, process, log)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(site: Site, process: subprocess.Popen[str], log: Path) -> None:
    by_s = time.monotonic() + START_S
    while time.monotonic() < by_s and process.poll() is None:
        try:
            if httpx.get(f"{site.url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server did not get ready:\n{log.read_text(encoding='utf-8')}")
