"""Fathom itself: `fathom serve` of this checkout, its defaults but for the KV cache's bound.

One server answers base and adapter requests. The cache is bounded as every server's here is, so that
all of them lie in memory together; it holds every request in flight many times over.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.peers.cases import Case
from tests.bench.peers.dialects import OpenAIDialect
from tests.bench.peers.peer import Place
from tests.bench.peers.process import free_port, serving
from tests.bench.peers.side import HttpSide, Side

BASE = "base"


class Fathom:
    """See `peer.Peer`."""

    name = "fathom"
    title = "Fathom (HTTP)"
    packages = ("torch", "transformers")
    cannot: dict[str, str] = {}  # noqa: RUF012 - a protocol's attribute, never written
    notes: dict[str, str] = {}  # noqa: RUF012

    def prepare(self, place: Place) -> Path:
        """See `Peer.prepare`: the interpreter is given."""
        return place.fathom_python

    def variant(self, case: Case) -> str:
        """See `Peer.variant`."""
        return "bfloat16" if case.is_16_bit else "float32"

    @contextmanager
    def serve(self, variant: str, place: Place) -> Iterator[Side]:
        """See `Peer.serve`."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command: list[Any] = [place.fathom_python, "-m", "server", "serve"]
        command += [place.models.base(variant), "--served-model-name", BASE, "--dtype", variant]
        command += ["--host", "127.0.0.1", "--port", port, "--kv-cache-bytes", "1GiB"]
        for name, path in place.models.adapters.items():
            command += ["--adapter", f"{name}={path}"]
        log = place.log(f"fathom-{variant}")
        environment = {"PYTHONPATH": str(place.checkout), "PYTHONSAFEPATH": "1"}
        with serving(command, url, log=log, environment=environment, ready_path="/ready") as tree:
            yield HttpSide(tree, url, OpenAIDialect(BASE, {"lora_depth": "full"}))
