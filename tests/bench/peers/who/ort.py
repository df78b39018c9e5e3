"""ONNX Runtime GenAI behind the thin HTTP layer, its models made by its own model builder in float32.

The builder is run for the base model and once for each adapter; `served/ort_adapters` makes of the
latter one model with adapter files. A batch has one adapter. Its configuration wants a token that ends
a text: see `models.with_end_token`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.peers.cases import Case
from tests.bench.peers.dialects import OpenAIDialect
from tests.bench.peers.environment import Environment, run
from tests.bench.peers.models import with_end_token
from tests.bench.peers.peer import Place
from tests.bench.peers.process import free_port, serving
from tests.bench.peers.side import HttpSide, Side
from tests.bench.peers.who.openvino import BASE, NOT_16_BIT, ONE_ADAPTER

ENVIRONMENT = Environment(
    "ort",
    (
        "onnxruntime==1.32.0",
        "onnxruntime-genai==0.18.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "transformers==5.23.0",
        "peft==0.21.2",
        "fastapi==0.165.0",
        "uvicorn==0.54.0",
    ),
)


class Ort:
    """See `peer.Peer`."""

    name = "ort"
    title = "ONNX Runtime GenAI (our HTTP)"
    packages = ("onnxruntime-genai", "onnxruntime", "torch", "transformers")
    cannot: dict[str, str] = {"16-bit": NOT_16_BIT}  # noqa: RUF012 - a protocol's attribute
    notes: dict[str, str] = {"16-four": ONE_ADAPTER}  # noqa: RUF012

    def prepare(self, place: Place) -> Path:
        """See `Peer.prepare`."""
        python = ENVIRONMENT.make(place.root)
        root = place.models.converted("ort")
        source = root / "source"
        if not (root / "base").exists():
            with_end_token(place.models.base("float32"), source)
            _build(python, source, root / "base")
        if not (root / "adapted").exists():
            script = place.checkout / "tests/bench/peers/served/ort_adapters.py"
            command = [str(python), str(script), "--target", str(root / "adapted.partial")]
            for name, path in place.models.adapters.items():
                if not (root / name).exists():
                    _build(python, source, root / name, f"adapter_path={path}")
                command += ["--built", f"{name}={root / name}"]
            run(command)
            (root / "adapted.partial").rename(root / "adapted")
        return python

    def variant(self, case: Case) -> str:
        """See `Peer.variant`."""
        return "float32"

    @contextmanager
    def serve(self, variant: str, place: Place) -> Iterator[Side]:
        """See `Peer.serve`."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        root = place.models.converted("ort")
        script = place.checkout / "tests/bench/peers/served/ort_engine.py"
        command: list[Any] = [ENVIRONMENT.python(place.root), script, "--port", port]
        command += ["--base", root / "base", "--adapted", root / "adapted"]
        for name in place.models.adapters:
            command += ["--adapter", name]
        with serving(command, url, log=place.log("ort"), environment={}) as tree:
            yield HttpSide(tree, url, OpenAIDialect(BASE))


def _build(python: Path, source: Path, target: Path, *options: str) -> None:
    """Run the model builder; writes a whole directory or none."""
    partial = target.with_suffix(".partial")
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "--input", str(source)]
    command += ["--output", str(partial), "--precision", "fp32", "--execution_provider", "cpu"]
    command += ["--cache_dir", str(target.parent / "cache")]
    if options:
        command += ["--extra_options", *options]
    run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    partial.rename(target)
