"""Another client's word: `vllm bench serve --lora-modules` against a running Fathom.

vLLM's load client knows nothing of this bench. It sends random prompts of the tokenizer's own words to
the adapters in turn, 16 at a time; its figure should be near the bench's own for 16 streams and four
adapters, and every request has to succeed.
"""

import json
import os
from typing import Any

from tests.bench.peers.cases import BY_KEY, OUTPUT_LEN, PROMPT_LEN
from tests.bench.peers.environment import run
from tests.bench.peers.peer import Place
from tests.bench.peers.side import HttpSide
from tests.bench.peers.who.fathom import BASE, Fathom
from tests.bench.peers.who.vllm import ENVIRONMENT, Vllm

_NUM_REQUESTS = 64
_KEPT = ("completed", "failed", "output_throughput", "median_ttft_ms", "median_itl_ms")


def cross_check(place: Place) -> dict[str, Any]:
    """What the client says of a Fathom server of its own. Raises CalledProcessError where it fails."""
    Vllm().prepare(place)
    directory = place.root / "cross-check"
    directory.mkdir(exist_ok=True)
    case = BY_KEY["16-four"]
    with Fathom().serve("float32", place) as side:
        assert isinstance(side, HttpSide)
        vllm = ENVIRONMENT.directory(place.root) / "bin" / "vllm"
        command = [str(vllm), "bench", "serve", "--backend", "openai", "--base-url", side.url]
        command += ["--model", BASE, "--tokenizer", str(place.models.base("float32"))]
        command += ["--lora-modules", *case.adapters, "--dataset-name", "random", "--ignore-eos"]
        command += ["--random-input-len", str(PROMPT_LEN), "--random-output-len", str(OUTPUT_LEN)]
        command += ["--num-prompts", str(_NUM_REQUESTS), "--temperature", "0"]
        command += ["--max-concurrency", str(case.num_streams), "--seed", str(place.models.seed)]
        command += ["--save-result", "--result-dir", str(directory)]
        command += ["--result-filename", "result.json"]
        run(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
    found = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in _KEPT if key in found}
