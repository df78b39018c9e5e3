"""OpenVINO GenAI behind the thin HTTP layer, its model exported by optimum-intel in float32.

It ignores `adapter_config.json`, so alpha / r is passed. A batch has one adapter. torchvision, which
optimum-intel requires, does not load beside the CPU build of torch and is removed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.peers.cases import Case
from tests.bench.peers.dialects import OpenAIDialect
from tests.bench.peers.environment import Environment, run
from tests.bench.peers.peer import Place
from tests.bench.peers.process import free_port, serving
from tests.bench.peers.side import HttpSide, Side

ENVIRONMENT = Environment(
    "openvino",
    (
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "optimum-intel==2.2.0",
        "fastapi==0.165.0",
        "uvicorn==0.54.0",
    ),
    ("torchvision",),
)
BASE = "base"
ONE_ADAPTER = "one batch an adapter"
NOT_16_BIT = "not part of this case"


class OpenVino:
    """See `peer.Peer`."""

    name = "openvino"
    title = "OpenVINO GenAI (our HTTP)"
    packages = ("openvino-genai", "openvino", "optimum-intel", "torch")
    cannot: dict[str, str] = {"16-bit": NOT_16_BIT}  # noqa: RUF012 - a protocol's attribute
    notes: dict[str, str] = {"16-four": ONE_ADAPTER}  # noqa: RUF012

    def prepare(self, place: Place) -> Path:
        """See `Peer.prepare`."""
        python = ENVIRONMENT.make(place.root)
        target = place.models.converted("openvino")
        if not target.exists():
            partial = target.with_suffix(".partial")
            command = [str(python.with_name("optimum-cli")), "export", "openvino"]
            command += ["--model", str(place.models.base("float32")), "--weight-format", "fp32"]
            run([*command, "--task", "text-generation-with-past", str(partial)])
            partial.rename(target)
        return python

    def variant(self, case: Case) -> str:
        """See `Peer.variant`."""
        return "float32"

    @contextmanager
    def serve(self, variant: str, place: Place) -> Iterator[Side]:
        """See `Peer.serve`."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        script = place.checkout / "tests/bench/peers/served/openvino_engine.py"
        command: list[Any] = [ENVIRONMENT.python(place.root), script, "--port", port]
        command += ["--model", place.models.converted("openvino")]
        for name, path in place.models.adapters.items():
            command += ["--adapter", f"{name}={path}"]
        command += ["--scaling", scaling(place.models.adapters["a0"])]
        with serving(command, url, log=place.log("openvino"), environment={}) as tree:
            yield HttpSide(tree, url, OpenAIDialect(BASE))


def scaling(adapter: Path) -> float:
    """alpha / r of a PEFT checkpoint."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return float(config["lora_alpha"] / config["r"])
