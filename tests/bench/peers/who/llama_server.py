"""llama.cpp's `llama-server`, built here from the source package of llama-cpp-python.

Native flags, two build jobs; model and adapters go through its own converters, in float32 and in
float16. Its KV cache gets the weights' type, since float16 keys would give other tokens in float32.
Adapters are chosen by the body's `lora`, every id each time, since an id that is left out applies in
full. Slots of one batch that want other adapters wait for each other: it cannot mix them, which the
case with four shows. Each request gets a new connection: a kept one is closed under the client's feet.

GGUF cannot say that no token ends a text: see `models.with_end_token`.
"""

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.bench.peers.cases import OUTPUT_LEN, PROMPT_LEN, Case
from tests.bench.peers.dialects import LlamaDialect
from tests.bench.peers.environment import Environment, run
from tests.bench.peers.models import with_end_token
from tests.bench.peers.peer import Place
from tests.bench.peers.process import free_port, serving
from tests.bench.peers.side import HttpSide, Side

VERSION = "0.3.36"
ENVIRONMENT = Environment(
    "llama", ("transformers==5.23.0", "sentencepiece==0.2.3", "protobuf==7.36.2")
)
_NUM_SLOTS = 16
_LEN = PROMPT_LEN + OUTPUT_LEN
_TYPES = {"float32": "f32", "float16": "f16"}
_FLAGS = {"float32": ["--flash-attn", "off"], "float16": []}
"""Flash attention rounds: with it 4 of 20 completions in float32 were others than PEFT's, by up to
1e-3 nats at the first token that differed, and without it none were."""
_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


class LlamaServer:
    """See `peer.Peer`."""

    name = "llama"
    title = f"llama.cpp `llama-server` of llama-cpp-python {VERSION} (HTTP)"
    packages = ("torch", "transformers")
    cannot: dict[str, str] = {}  # noqa: RUF012 - a protocol's attribute, never written
    notes: dict[str, str] = {  # noqa: RUF012
        "16-four": "cannot mix",
        "16-bit": "f16, cannot mix, outputs unchecked",
    }

    def prepare(self, place: Place) -> Path:
        """See `Peer.prepare`."""
        python = ENVIRONMENT.make(place.root)
        source = self._source(place, python)
        if not self._server(place).exists():
            build = self._build(place)
            run(["cmake", "-S", str(source), "-B", str(build), *_CMAKE])
            run(["cmake", "--build", str(build), "--target", "llama-server", "-j", "2"])
        for dtype, kind in _TYPES.items():
            self._convert(place, python, source, dtype, kind)
        return python

    def variant(self, case: Case) -> str:
        """See `Peer.variant`."""
        return "float16" if case.is_16_bit else "float32"

    @contextmanager
    def serve(self, variant: str, place: Place) -> Iterator[Side]:
        """See `Peer.serve`."""
        kind = _TYPES[variant]
        converted = place.models.converted("llama")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        adapters = tuple(place.models.adapters)
        num_threads = psutil.cpu_count(logical=False)
        command: list[Any] = [self._server(place), "--model", converted / f"model-{kind}.gguf"]
        command += ["--lora", ",".join(str(converted / f"{n}-{kind}.gguf") for n in adapters)]
        command += ["--host", "127.0.0.1", "--port", port, "--threads", num_threads]
        command += ["--parallel", _NUM_SLOTS, "--ctx-size", _NUM_SLOTS * 2 * _LEN]
        command += ["--cache-type-k", kind, "--cache-type-v", kind, "--cache-ram", 0, "--no-ui"]
        command += _FLAGS[variant]
        with serving(command, url, log=place.log(f"llama-{variant}"), environment={}) as tree:
            yield HttpSide(tree, url, LlamaDialect(adapters))

    def _build(self, place: Place) -> Path:
        return ENVIRONMENT.directory(place.root) / "build"

    def _server(self, place: Place) -> Path:
        return self._build(place) / "bin" / "llama-server"

    def _source(self, place: Place, python: Path) -> Path:
        """llama.cpp as the source package carries it."""
        folder = ENVIRONMENT.directory(place.root) / "source"
        source = folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
        if not source.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--no-binary", "llama-cpp-python", "--dest", str(folder)]
            run([*command, f"llama-cpp-python=={VERSION}"])
            (archive,) = folder.glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter="data")
        return source

    def _convert(self, place: Place, python: Path, source: Path, dtype: str, kind: str) -> None:
        converted = place.models.converted("llama")
        target = converted / f"model-{kind}.gguf"
        base = converted / "base"
        if not target.exists():
            self._name_tokens(place, python, base)
            script = source / "convert_hf_to_gguf.py"
            _convert(python, script, base, target, kind)
        for name, path in place.models.adapters.items():
            target = converted / f"{name}-{kind}.gguf"
            if not target.exists():
                script = source / "convert_lora_to_gguf.py"
                _convert(python, script, path, target, kind, "--base", str(base))

    def _name_tokens(self, place: Place, python: Path, base: Path) -> None:
        """A copy of the model with a vocabulary that the converter reads."""
        vocab_size = with_end_token(place.models.base("float32"), base)
        for path in base.glob("tokenizer*"):
            path.unlink()
        script = place.checkout / "tests/bench/peers/served/sentencepiece_words.py"
        run([str(python), str(script), str(base), str(vocab_size)])


def _convert(python: Path, script: Path, source: Path, target: Path, kind: str, *more: str) -> None:
    """Write a whole file or none."""
    partial = target.with_suffix(".partial")
    run(
        [str(python), str(script), str(source), "--outfile", str(partial), "--outtype", kind, *more]
    )
    partial.rename(target)
