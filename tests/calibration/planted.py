"""Data sets whose best depth is known: every completion is what one depth of an adapter writes.

PEFT writes it, greedily. So that depth matches every reference exactly, and finds each of its tokens
more likely than another model does.
"""

from collections.abc import Sequence
from typing import Any

from boundary.dataset import Dataset, Sample
from server.engine.detokenizer import Detokenizer
from tests.parity.oracle import Oracle
from tests.parity.zoo import random_prompt
from tests.tiny import Tiny

NUM_SAMPLES = 34
LENGTH = 4
DEPTH = 2

_made: dict[Any, Dataset] = {}


def oracle(tiny: Tiny, adapter: str) -> Oracle:
    return Oracle(tiny.model_path, tiny.adapter(adapter))


def written(tiny: Tiny, prompt: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of tokens after a prompt, whose last byte may begin a character."""
    detokenizer = Detokenizer(tiny.base.tokenizer, prompt, (), skip_special_tokens=True)
    detokenizer.append(token_ids)
    detokenizer.finish()
    return detokenizer.text


def planted(
    tiny: Tiny,
    adapter: str,
    *,
    depth: int = DEPTH,
    num_samples: int = NUM_SAMPLES,
    length: int = LENGTH,
) -> Dataset:
    key = (tiny.adapter(adapter), depth, num_samples, length)
    if key not in _made:
        _made[key] = _plant(tiny, adapter, depth, num_samples, length)
    return _made[key]


def _plant(tiny: Tiny, adapter: str, depth: int, num_samples: int, length: int) -> Dataset:
    peft = oracle(tiny, adapter)
    samples = []
    for seed in range(num_samples):
        prompt = random_prompt(4 + seed % 3, seed=seed)
        token_ids = peft.greedy(prompt, length, depth).token_ids
        samples.append(Sample(prompt, token_ids, written(tiny, prompt, token_ids)))
    return Dataset("completion", tuple(samples), f"sha256:{'d' * 64}", (), num_samples)
