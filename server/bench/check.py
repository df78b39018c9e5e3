"""Is what is about to be timed also right? The engine beside PEFT (or `generate`), token by token.

Two comparisons of greedy completions, with all sampled requests in one batch on both sides:

1. The engine's tokens beside the reference's own free-running tokens: the share that is equal.
2. One forward pass of the reference over each prompt with the *engine's* tokens behind it. At each
   place the engine's log-probability of its token must be the reference's, and its token must be the
   reference's best, both within the dtype's tolerance.

The second decides. In float32 it leaves no other token than an exact tie. In 16 bits two right
engines part after some tokens, because rounding turns close calls, so the first is for information.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from server.bench.baseline import StaticModel
from server.bench.in_process import EngineClient
from server.bench.workload import WorkItem

MAX_OUTPUT_LEN = 32
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""On each natural-log probability; on their mean a fifth of it. In float32 two right engines differ by
1e-6 to 1e-5; in bfloat16 a logit of size 4 alone is rounded by 2**-7, and every layer before it too."""
_MEAN_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How far the engine is from its reference."""

    reference: str
    dtype: str
    tolerance: float
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
        worst = max(self.max_logprob_error, self.max_margin, self.mean_logprob_error / _MEAN_SHARE)
        return worst <= self.tolerance

    def __str__(self) -> str:
        verdict = "passed" if self.is_passed else "FAILED"
        return (
            f"check {verdict} against {self.reference} in {self.dtype}: {self.num_equal_tokens} of"
            f" {self.num_tokens} tokens of {self.num_requests} requests equal; log-probabilities"
            f" within {self.max_logprob_error:.2g} (mean {self.mean_logprob_error:.2g}),"
            f" choices within {self.max_margin:.2g} (tolerance {self.tolerance:g})"
        )


def check(
    client: EngineClient, reference: StaticModel, items: Sequence[WorkItem], dtype: str
) -> CheckResult:
    """Compare completions of `items`, each cut to at most 32 tokens."""
    items = [replace(item, output_len=min(item.output_len, MAX_OUTPUT_LEN)) for item in items]
    answers = asyncio.run(_answers(client, items))
    expected = reference.complete(items)
    num_equal, margin, errors = 0, 0.0, list[float]()
    for item, (tokens, logprobs), expected_tokens in zip(items, answers, expected, strict=True):
        pairs = zip(tokens, expected_tokens, strict=True)
        num_equal += sum(token == other for token, other in pairs)
        scores = reference.log_probabilities(item, tokens)
        of_tokens = scores.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        errors.extend((of_tokens - torch.tensor(logprobs)).abs().tolist())
        margin = max(margin, float((scores.max(1).values - of_tokens).max()))
    return CheckResult(
        reference=reference.name,
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        num_requests=len(items),
        num_tokens=len(errors),
        num_equal_tokens=num_equal,
        max_logprob_error=max(errors),
        mean_logprob_error=sum(errors) / len(errors),
        max_margin=margin,
    )


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
