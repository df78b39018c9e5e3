"""A random base model with adapters and records in every state a root may be in, and a vLLM over it."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch

from boundary.record import FILE_NAME, BoundaryRecord, write
from server.bench.random_model import save_random_adapter, save_random_model
from server.bench.shape import parse_shape
from server.model import loader
from server.model.checkpoint import read_checkpoint
from server.model.targets import Targets
from tests.bench.peers.dialects import words
from tests.bench.peers.process import free_port, serving
from tests.vllm.overlay import Overlay

SHAPE = parse_shape("6x128:intermediate=256:heads=2:vocab=500")
NUM_LAYERS = 6
RANK = 8
MAX_RANK = 16
CALIBRATED = 4
BASE = "base"
NUM_SLOTS = 3
"""Adapters in vLLM's memory: fewer than there are names, so that it reads cuts again and again."""
LENGTH = 8
MAX_LEN = 256


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything lies. `outside` is an adapter that is not below the root."""

    directory: Path

    @property
    def base(self) -> Path:
        return self.directory / "model"

    @property
    def root(self) -> Path:
        return self.directory / "adapters"

    @property
    def outside(self) -> Path:
        return self.directory / "outside"

    @property
    def cache(self) -> Path:
        return self.directory / "cache"

    def adapter(self, name: str) -> Path:
        return self.root / name


def make_site(directory: Path) -> Site:
    """Adapters `a` and `b` as they are, `calibrated` with its record, `moving` to be replaced."""
    site = Site(directory)
    save_random_model(SHAPE, site.base, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    site.root.mkdir()
    for seed, name in enumerate(("a", "b", "calibrated", "moving", "foreign"), start=1):
        save(site, site.adapter(name), seed)
    save(site, site.outside, 50)
    for name in ("calibrated", "foreign"):
        calibrate(site, name, CALIBRATED)
    # Another adapter's record: it is about other content.
    shutil.copy(site.adapter("calibrated") / FILE_NAME, site.adapter("foreign") / FILE_NAME)
    (site.root / "leading_out").symlink_to(site.outside)
    shutil.copytree(site.adapter("a"), site.adapter("weights_outside"))
    weights = site.adapter("weights_outside") / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(site.outside / "adapter_model.safetensors")
    shutil.copytree(site.adapter("a"), site.adapter("pickle"))
    (site.adapter("pickle") / "adapter_model.safetensors").rename(
        site.adapter("pickle") / "adapter_model.bin"
    )
    save(site, site.adapter("too_wide"), 60, rank=2 * MAX_RANK)
    return site


def save(site: Site, directory: Path, seed: int, rank: int = RANK) -> None:
    """Write a random adapter, over one that is there as a careful operator does: in one step."""
    beside = directory.with_name(f".{directory.name}")
    save_random_adapter(SHAPE, beside, rank=rank, seed=seed, base=site.base)
    if directory.exists():
        old = directory.with_name(f".old-{directory.name}")
        directory.rename(old)
        beside.rename(directory)
        shutil.rmtree(old)
    else:
        beside.rename(directory)


def calibrate(site: Site, name: str, depth: int) -> None:
    """Leave the record that Fathom would leave beside an adapter, by its own reading of both."""
    base = loader.load(str(site.base), None, "cpu", "float32")
    digest = read_checkpoint(site.adapter(name), Targets(base.model)).digest
    pinned = BoundaryRecord.pinned(
        depth, base.num_layers, "for a test", base=base.revision, adapter=digest
    )
    write(pinned, site.adapter(name) / FILE_NAME)


@dataclass(frozen=True, slots=True)
class Served:
    """vLLM, running."""

    url: str
    log: Path

    def post(self, model: str, prompt: Sequence[int], length: int = LENGTH) -> httpx2.Response:
        """Ask for a greedy completion."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": length,
            "min_tokens": length,
            "ignore_eos": True,
            "temperature": 0,
        }
        return httpx2.post(f"{self.url}/v1/completions", json=body, timeout=300, trust_env=False)

    def completion(self, model: str, prompt: Sequence[int], length: int = LENGTH) -> list[int]:
        """Its tokens, by the model that was asked."""
        response = self.post(model, prompt, length)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["model"] == model
        (choice,) = answer["choices"]
        return list(words(choice["text"]))

    def error(self, model: str) -> tuple[int, str]:
        """The status and words of a refusal."""
        response = self.post(model, [1, 2, 3], 2)
        return response.status_code, response.json()["error"]["message"]

    def roots(self) -> dict[str, str]:
        """Model's name -> where vLLM reads it, of those that it knows."""
        cards = httpx2.get(f"{self.url}/v1/models", timeout=60, trust_env=False).json()["data"]
        return {card["id"]: card["root"] for card in cards}


@contextmanager
def serve(
    site: Site, overlay: Overlay, modules: dict[str, Path], **changes: str
) -> Iterator[Served]:
    """A stock `vllm serve` with the plugin, and with `modules` as plain adapters."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command: list[Any] = [overlay.python, "-m", "vllm.entrypoints.cli.main", "serve", site.base]
    command += ["--served-model-name", BASE, "--dtype", "float32", "--host", "127.0.0.1"]
    command += ["--port", port, "--max-num-seqs", 16, "--max-model-len", MAX_LEN]
    command += ["--enable-lora", "--max-loras", NUM_SLOTS, "--max-cpu-loras", NUM_SLOTS]
    command += ["--max-lora-rank", MAX_RANK]
    if modules:
        command += ["--lora-modules", *(f"{name}={path}" for name, path in modules.items())]
    environment = overlay.variables | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "FATHOM_VLLM_ADAPTER_ROOT": str(site.root),
        "FATHOM_VLLM_CACHE_DIR": str(site.cache),
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": "",
    }
    log = site.directory / "log" / "vllm.log"
    with serving(command, url, log=log, environment=environment | changes):
        yield Served(url, log)
