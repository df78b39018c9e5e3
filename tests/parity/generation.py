"""Drives an `EngineCore` step by step and collects what each request got, raw logits included.

The engine reports log-probabilities, which hide a shift common to a row. So each step's logits are
caught on their way from the runner, however it computed them, and the log-probabilities say which of
the rows belongs to which request, in whatever order the engine packed them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.config import Settings
from server.engine.core import EngineCore
from server.engine.request import LoraSelection, Request, RequestOutput, SamplingParams
from server.model.batch import BatchedSequence
from tests.device import DEVICE
from tests.parity.zoo import VOCAB_SIZE

MAX_STEPS = 2000
"""An engine that has not finished by then is stuck."""


@dataclass(slots=True)
class Generated:
    """What one request got."""

    token_ids: tuple[int, ...] = ()
    rows: list[torch.Tensor] = field(default_factory=list)
    """Raw logits `[vocab_size]` of each token, where they were caught."""
    num_cached_tokens: int = 0
    finish_reason: str | None = None

    @property
    def logits(self) -> torch.Tensor:
        """`[num_tokens, vocab_size]`"""
        return torch.stack(self.rows)


@contextmanager
def open_core(model: Path, **settings: Any) -> Iterator[EngineCore]:
    """A float32 engine, closed at the end."""
    small = {
        "kv_cache_bytes": 4 << 20,
        "block_size": 4,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 32,
        "max_loras": 8,
        "dtype": "float32",
    }
    core = EngineCore.from_settings(
        Settings.model_validate({"model": str(model), "device": DEVICE} | small | settings)
    )
    try:
        yield core
    finally:
        core.close()


def greedy(
    request_id: str, prompt: tuple[int, ...], lora: LoraSelection, max_tokens: int
) -> Request:
    """A greedy request that reports every token's whole distribution."""
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE
    )
    return Request(id=request_id, prompt_token_ids=prompt, sampling=sampling, lora=lora)


@contextmanager
def _caught_logits(core: EngineCore) -> Iterator[list[torch.Tensor]]:
    """The rows of logits that the runner returned, which the reader shortens."""
    rows: list[torch.Tensor] = []
    run, run_ahead = core.runner.run, core.runner.run_ahead

    def caught(batch: Sequence[BatchedSequence]) -> tuple[torch.Tensor, list[int]]:
        logits, order = run(batch)
        rows.extend(logits.float().cpu().clone())
        return logits, order

    def caught_ahead(*args: Any) -> tuple[torch.Tensor, list[int]] | None:
        result = run_ahead(*args)
        if result is not None:
            rows.extend(result[0].float().cpu().clone())
        return result

    core.runner.run = caught  # type: ignore[method-assign]
    core.runner.run_ahead = caught_ahead  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        core.runner.run = run  # type: ignore[method-assign]
        core.runner.run_ahead = run_ahead  # type: ignore[method-assign]


def _find_row(rows: list[torch.Tensor], top: Iterable[tuple[int, float]]) -> torch.Tensor:
    ids, values = zip(*top, strict=True)
    expected = torch.empty(VOCAB_SIZE).scatter_(0, torch.tensor(ids), torch.tensor(values))
    for row in rows:
        if torch.allclose(row.log_softmax(-1), expected, rtol=0, atol=2e-5):
            return row
    raise AssertionError("reported log-probabilities belong to no row of logits of this step")


def collect(
    generated: dict[str, Generated], output: RequestOutput, rows: list[torch.Tensor]
) -> None:
    """Add one output to what its request got so far."""
    assert output.error is None, output.error
    mine = generated.setdefault(output.request_id, Generated())
    assert mine.finish_reason is None, f"{output.request_id}: an output after its last"
    for delta in output.deltas:
        mine.token_ids += delta.token_ids
        mine.rows += [_find_row(rows, logprobs.top) for logprobs in delta.logprobs if logprobs.top]
        mine.finish_reason = delta.finish_reason
    assert output.finished == (mine.finish_reason is not None)
    mine.num_cached_tokens = output.num_cached_tokens


def generate(
    core: EngineCore, requests: Iterable[Request], join_at: Mapping[str, int] | None = None
) -> dict[str, Generated]:
    """Run requests to their ends; `join_at` says before which step a request is added (0)."""
    join_at = join_at or {}
    waiting = sorted(requests, key=lambda request: join_at.get(request.id, 0))
    generated: dict[str, Generated] = {}
    num_old = 0
    with _caught_logits(core) as rows:
        for step in range(MAX_STEPS):
            while waiting and join_at.get(waiting[0].id, 0) <= step:
                core.add(waiting.pop(0))
            if not core.has_work:
                if not waiting:
                    return generated
                continue
            # A device may have been given the step after the one whose tokens are told: two are kept.
            del rows[:num_old]
            num_old = len(rows)
            for output in core.step():
                collect(generated, output, rows)
    raise AssertionError(f"work is left after {MAX_STEPS} steps")
