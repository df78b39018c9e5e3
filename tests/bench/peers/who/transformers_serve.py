"""`transformers serve` with continuous batching: the base model only, since it has no adapters.

Its pool of KV blocks is bounded, because by itself it takes most of the machine's memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.peers.cases import OUTPUT_LEN, PROMPT_LEN, Case
from tests.bench.peers.dialects import TransformersDialect
from tests.bench.peers.environment import Environment
from tests.bench.peers.peer import Place
from tests.bench.peers.process import free_port, serving
from tests.bench.peers.side import HttpSide, Side
from tests.bench.peers.who.in_process import NO_ADAPTERS

ENVIRONMENT = Environment("transformers", ("transformers[serving]==5.23.0",))
_BLOCK_SIZE = 32
_NUM_BLOCKS = 2 * 16 * (PROMPT_LEN + OUTPUT_LEN) // _BLOCK_SIZE
_MAX_BATCH_TOKENS = 512


class TransformersServe:
    """See `peer.Peer`."""

    name = "transformers"
    title = "transformers serve (HTTP)"
    packages = ("transformers", "torch")
    cannot: dict[str, str] = dict.fromkeys(
        ("1-adapter", "16-one", "16-four", "16-bit"), NO_ADAPTERS
    )
    notes: dict[str, str] = {}  # noqa: RUF012

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
        model = str(place.models.base(variant))
        program = ENVIRONMENT.python(place.root).with_name("transformers")
        command: list[Any] = [program, "serve", model, "--continuous-batching", "--device", "cpu"]
        command += ["--dtype", variant, "--host", "127.0.0.1", "--port", port]
        command += ["--cb-block-size", _BLOCK_SIZE, "--cb-num-blocks", _NUM_BLOCKS]
        command += ["--cb-max-batch-tokens", _MAX_BATCH_TOKENS]
        log = place.log("transformers")
        with serving(command, url, log=log, environment={"HF_HUB_OFFLINE": "1"}) as tree:
            yield HttpSide(tree, url, TransformersDialect(model))
