"""Is what is about to be timed also right? The engine beside PEFT (or `generate`), token by token.

Two comparisons of greedy completions, with all sampled requests in one batch on both sides:

1. The engine's tokens beside the reference's own free-running tokens: the share that is equal.
2. One forward pass of the reference in float32 over each prompt with the *engine's* tokens behind it. At
   each place the engine's log-probability of its token must be the reference's, and its token must be the
   reference's best, both within a tolerance.

The second decides. In float32 it leaves no other token than an exact tie. In 16 bits two right engines part
after some tokens, because rounding turns close calls, so the first is for information; and how far rounding
may take them depends on the model's depth and width, so the measure is the reference itself: computed in the
same 16 bits, it is so far from what the same weights give in float32, and the engine may be hardly farther.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.bench.baseline import StaticModel
from server.bench.in_process import EngineClient
from server.bench.workload import WorkItem

MAX_OUTPUT_LEN = 32
TOLERANCE, MEAN_TOLERANCE = 1e-3, 2e-4
"""In float32, on each natural-log probability, of which two right engines give 1e-6 to 1e-5 apart, and on
the mean."""
NOISE_RATIO, MEAN_NOISE_RATIO = 2.0, 1.5
"""In 16 bits: how many times the reference's largest and mean error the engine's may be."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How far the engine is from its reference."""

    reference: str
    dtype: str
    tolerance: float
    mean_tolerance: float
    num_requests: int
    num_tokens: int
    num_equal_tokens: int
    max_logprob_error: float
    mean_logprob_error: float
    max_margin: float
    """How much likelier than the engine's token the reference's best was, at worst."""

    @property
    def is_passed(self) -> bool:
        """True where nothing differs by more than the tolerance."""
        worst = max(self.max_logprob_error, self.max_margin)
        return worst <= self.tolerance and self.mean_logprob_error <= self.mean_tolerance

    def __str__(self) -> str:
        verdict = "passed" if self.is_passed else "FAILED"
        return (
            f"check {verdict} against {self.reference} in {self.dtype}: {self.num_equal_tokens} of"
            f" {self.num_tokens} tokens of {self.num_requests} requests equal; log-probabilities"
            f" within {self.max_logprob_error:.2g} (mean {self.mean_logprob_error:.2g}),"
            f" choices within {self.max_margin:.2g}"
            f" (tolerance {self.tolerance:.2g}, mean {self.mean_tolerance:.2g})"
        )


def check(
    client: EngineClient, reference: StaticModel, items: Sequence[WorkItem], dtype: str
) -> CheckResult:
    """Compare completions of `items`, each cut to at most 32 tokens."""
    items = [replace(item, output_len=min(item.output_len, MAX_OUTPUT_LEN)) for item in items]
    answers = asyncio.run(_answers(client, items))
    expected = reference.complete(items)
    num_equal = sum(
        token == other
        for (tokens, _), others in zip(answers, expected, strict=True)
        for token, other in zip(tokens, others, strict=True)
    )
    completions = [tokens for tokens, _ in answers]
    tolerance, mean_tolerance = TOLERANCE, MEAN_TOLERANCE
    if dtype == "float32":
        exact = _scores(reference, items, completions)
    else:
        rounded = _scores(reference, items, completions)
        reference.compute_in("float32")
        try:
            exact = _scores(reference, items, completions)
        finally:
            reference.compute_in(dtype)
        noise = (rounded.of_tokens - exact.of_tokens).abs()
        tolerance = NOISE_RATIO * float(noise.max())
        mean_tolerance = MEAN_NOISE_RATIO * float(noise.mean())
    errors = (
        torch.tensor([each for _, logprobs in answers for each in logprobs]) - exact.of_tokens
    ).abs()
    return CheckResult(
        reference=reference.name,
        dtype=dtype,
        tolerance=tolerance,
        mean_tolerance=mean_tolerance,
        num_requests=len(items),
        num_tokens=len(errors),
        num_equal_tokens=num_equal,
        max_logprob_error=float(errors.max()),
        mean_logprob_error=float(errors.mean()),
        max_margin=float((exact.of_best - exact.of_tokens).max()),
    )


@dataclass(frozen=True, slots=True)
class _Scores:
    of_tokens: Tensor
    """float32 `[num_tokens]`: log-probability of each token of each completion, one after the other."""
    of_best: Tensor
    """Of the likeliest token there."""


def _scores(
    reference: StaticModel, items: Sequence[WorkItem], completions: Sequence[Sequence[int]]
) -> _Scores:
    of_tokens, of_best = [], []
    for item, tokens in zip(items, completions, strict=True):
        scores = reference.log_probabilities(item, tokens)
        of_tokens.append(scores.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1))
        of_best.append(scores.max(1).values)
    return _Scores(torch.cat(of_tokens), torch.cat(of_best))


def sample(items: Sequence[WorkItem], num_requests: int) -> list[WorkItem]:
    """At most `num_requests` items; the first of every choice comes before the second of any."""
    seen: dict[object, int] = {}
    ranked: list[tuple[int, int]] = []
    for index, item in enumerate(items):
        seen[item.choice] = seen.get(item.choice, 0) + 1
        ranked.append((seen[item.choice], index))
    num_requests = max(num_requests, len(seen))
    return [items[index] for _, index in sorted(ranked)[:num_requests]]


async def _answers(
    client: EngineClient, items: Sequence[WorkItem]
) -> list[tuple[list[int], list[float]]]:
    return await asyncio.gather(*(_answer(client, item) for item in items))


async def _answer(client: EngineClient, item: WorkItem) -> tuple[list[int], list[float]]:
    tokens: list[int] = []
    logprobs: list[float] = []
    request = await client.request(item, logprobs=0)
    async for output in client.engine.generate(request):
        if output.error is not None:
            raise output.error
        for delta in output.deltas:
            tokens.extend(delta.token_ids)
            logprobs.extend(scored.logprob for scored in delta.logprobs)
    return tokens, logprobs
