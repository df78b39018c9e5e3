"""Thirty requests of six adapters and five depths, and the check that each got what it gets alone.

Everything that can mix them up happens at once: they join at different steps, prompts share
prefixes and are prefilled in chunks, blocks run out, more adapters are asked for than have slots,
and some draw by a seed. The check is a function, so that negative controls can show that it fails.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams
from tests.parity.generation import Generated, generate
from tests.parity.zoo import NUM_LAYERS, VOCAB_SIZE, random_prompt

LOGITS_ATOL = 1e-4
MAX_TOKENS = 16
NUM_REQUESTS = 30
ADAPTERS = {
    "a": ("plain", 0, 4),
    "b": ("plain", 1, 8),
    "c": ("rslora", 2, 4),
    "d": ("dora", 3, 4),
    "e": ("patterns", 4, 4),
    "f": ("dora", 5, 2),
}
"""Name -> (variant, seed, rank)."""

SETTINGS = {
    "kv_cache_bytes": 160 << 10,
    "block_size": 4,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 8,
    "max_loras": 3,
}
"""Small enough that blocks and slots run out and every prompt takes several steps."""

SHARED_PREFIX = random_prompt(14, seed=100)
"""Not a multiple of the block size: its last tokens share a block with what follows."""


@dataclass(frozen=True, slots=True)
class Part:
    """One request of the mixture, before an engine gave it an adapter."""

    id: str
    adapter: str
    depth: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    join_at: int

    def request(self, core: EngineCore) -> Request:
        lora = core.registry.select(self.adapter, self.depth)
        return Request(self.id, self.prompt, self.sampling, lora)


def parts() -> list[Part]:
    """The mixture, always the same: four prompts, so that only adapter and depth tell most apart."""
    draw = random.Random(7)
    prompts = [SHARED_PREFIX + random_prompt(length, seed=length) for length in (5, 13, 20, 31)]
    pairs = [(adapter, depth) for adapter in ADAPTERS for depth in range(NUM_LAYERS + 1)]
    # Every pair at most twice, some not at all: equal pairs must share what others must not.
    chosen = draw.sample(pairs + pairs, NUM_REQUESTS)
    result = []
    for index, (adapter, depth) in enumerate(chosen):
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE
        )
        if index % 3 == 0:
            sampling = replace(sampling, temperature=0.8, seed=1000 + index)
        join_at = draw.randrange(40)
        prompt = draw.choice(prompts)
        result.append(Part(f"{index}:{adapter}@{depth}", adapter, depth, prompt, sampling, join_at))
    assert {part.adapter for part in result} == set(ADAPTERS)
    assert {part.depth for part in result} == set(range(NUM_LAYERS + 1))
    return result


def run_mixed(core: EngineCore) -> dict[str, Generated]:
    """All parts in one engine, each joining at its step."""
    mixture = parts()
    join_at = {part.id: part.join_at for part in mixture}
    return generate(core, [part.request(core) for part in mixture], join_at)


def mismatches(got: Mapping[str, Generated], expected: Mapping[str, Generated]) -> list[str]:
    """A line for each expected request whose tokens or logits differ from what it got."""
    lines = []
    for request_id, wanted in expected.items():
        if request_id not in got:
            lines.append(f"{request_id}: nothing")
        elif got[request_id].token_ids != wanted.token_ids:
            lines.append(f"{request_id}: {got[request_id].token_ids} != {wanted.token_ids}")
        elif not (error := (got[request_id].logits - wanted.logits).abs().max()) <= LOGITS_ATOL:
            lines.append(f"{request_id}: logits differ by {float(error):.1e}")
    return lines
