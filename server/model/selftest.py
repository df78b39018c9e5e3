"""At load: does the engine reproduce this model? Compared with `model.generate`, or the model is refused.

Runs transformers' own eager attention over a random prompt and greedy continuation, then the paged
runner over the same tokens with the prompt cut in two chunks, and compares the logits of every step.
Sliding windows are shrunk for the test, so that a window of thousands is exercised by a few tokens.
Adapters are not part of it: their proof is `tests/parity`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.errors import ModelError
from server.model.attention import ATTENTION_NAME, StepLayout
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache, KVSpec
from server.model.runner import ModelRunner
from server.model.sdpa import AttentionStep
from server.model.targets import Targets
from server.model.tolerance import LOGITS_TOLERANCE

_PROMPT_LEN = 21
_NUM_NEW = 4
_WINDOW = 8
_BLOCK_SIZE = 4


@dataclass(frozen=True, slots=True)
class Expectation:
    """What transformers alone says."""

    token_ids: list[int]
    logits: Tensor
    """float32 `[_NUM_NEW, vocab_size]`, which chose the last tokens."""


def expect(model: PreTrainedModel) -> Expectation:
    """Ask `model.generate` with eager attention, before anything of ours touches the weights."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocab_size, (1, _PROMPT_LEN), generator=generator)
    with _short_windows(model):
        return _generate(model, prompt.to(model.device))


def check(
    model: PreTrainedModel,
    targets: Targets,
    kv_specs: list[KVSpec],
    expected: Expectation,
    layout: type[StepLayout] = AttentionStep,
    block_size: int = _BLOCK_SIZE,
) -> float:
    """The relative error of the logits. Raises ModelError when it is too large. Leaves no trace."""
    num_blocks = -(-len(expected.token_ids) // block_size) + 1
    cache = KVCache(kv_specs, num_blocks, block_size, model.dtype, model.device)
    with _short_windows(model):
        runner = ModelRunner(model, cache, targets, max_loras=1, layout=layout)
        actual = _paged(runner, expected.token_ids)
    error = float((actual - expected.logits).norm() / expected.logits.norm())
    if not error <= LOGITS_TOLERANCE[model.dtype]:
        raise ModelError(
            f"{type(model).__name__} is refused: its logits in the paged engine differ from "
            f"model.generate by {error:.1e} of their norm (limit {LOGITS_TOLERANCE[model.dtype]:.0e} in "
            f"{model.dtype}), so this architecture has something the engine does not reproduce"
        )
    return error


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: Tensor) -> Expectation:
    model.set_attn_implementation("eager")
    try:
        generate: Any = model.generate
        result = generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            max_new_tokens=_NUM_NEW,
            min_new_tokens=_NUM_NEW,
            pad_token_id=0,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return Expectation(result.sequences[0].tolist(), torch.cat(result.logits).float())


def _paged(runner: ModelRunner, token_ids: list[int]) -> Tensor:
    # Physical blocks in reverse, so that a cache which ignored the block table would show.
    table = list(range(runner.cache.num_blocks))[::-1]
    cuts = [0, 9, _PROMPT_LEN, *range(_PROMPT_LEN + 1, _PROMPT_LEN + _NUM_NEW)]
    rows = []
    for start, end in pairwise(cuts):
        num_logits = int(end >= _PROMPT_LEN)
        sequence = BatchedSequence(token_ids[start:end], start, table, -1, 0, num_logits)
        rows.append(runner.run([sequence])[0])
    return torch.cat(rows).float()


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Set every sliding window, in the config and on the modules, to `_WINDOW` tokens."""
    owners: list[Any] = [model.config, model.config.get_text_config(), *model.modules()]
    windows = [
        (owner, owner.sliding_window)
        for owner in owners
        if isinstance(getattr(owner, "sliding_window", None), int)
    ]
    for owner, _ in windows:
        owner.sliding_window = _WINDOW
    try:
        yield
    finally:
        for owner, window in windows:
            owner.sliding_window = window
