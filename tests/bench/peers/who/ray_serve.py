"""Ray Serve with PEFT's mixed batch in one replica (`served/ray_app`), over its own HTTP proxy.

It is never paused: its control processes take each other for dead when they are stopped for longer than
their heartbeats allow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.peers.cases import Case
from tests.bench.peers.dialects import OpenAIDialect
from tests.bench.peers.environment import Environment
from tests.bench.peers.peer import Place
from tests.bench.peers.process import free_port, serving
from tests.bench.peers.side import HttpSide, Side
from tests.bench.peers.who.openvino import BASE, NOT_16_BIT

ENVIRONMENT = Environment("ray", ("ray[serve]==2.60.0", "transformers==5.23.0", "peft==0.21.2"))


class RayServe:
    """See `peer.Peer`."""

    name = "ray"
    title = "Ray Serve + PEFT batch (HTTP)"
    packages = ("ray", "peft", "transformers", "torch")
    cannot: dict[str, str] = {"16-bit": NOT_16_BIT}  # noqa: RUF012 - a protocol's attribute
    notes: dict[str, str] = {"16-four": "`adapter_names`"}  # noqa: RUF012

    def prepare(self, place: Place) -> Path:
        """See `Peer.prepare`."""
        return ENVIRONMENT.make(place.root)

    def variant(self, case: Case) -> str:
        """See `Peer.variant`."""
        return "float32"

    @contextmanager
    def serve(self, variant: str, place: Place) -> Iterator[Side]:
        """See `Peer.serve`."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        script = place.checkout / "tests/bench/peers/served/ray_app.py"
        command: list[Any] = [ENVIRONMENT.python(place.root), script, "--port", port]
        command += ["--model", place.models.base(variant)]
        for name, path in place.models.adapters.items():
            command += ["--adapter", f"{name}={path}"]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # By itself it makes its workers as nice as can be: anybody else's work would go first.
            "RAY_worker_niceness": "0",
        }
        with serving(command, url, log=place.log("ray"), environment=environment) as tree:
            yield HttpSide(tree, url, OpenAIDialect(BASE), is_pausable=False)
