"""What a cache that is too small costs: tokens computed again over tokens of use, beside the bound.

One engine a size of cache, all over the same model, in turn. The least size holds the longest request.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from server.bench.in_process import EngineClient
from server.bench.load import drive
from server.bench.measure import Measurement, Spread, measure
from server.bench.scaling.report import spread
from server.bench.workload import Workload
from server.engine.async_engine import AsyncEngine
from server.engine.scheduler import MAX_RECOMPUTED
from server.loading import ReportProgress


@dataclass(frozen=True, slots=True)
class PreemptionCost:
    """One size of cache. percent: of what all requests in flight can fill. errors: of its requests."""

    percent: int
    num_blocks: int
    runs: tuple[Measurement, ...]
    errors: tuple[str, ...]

    @property
    def recomputed(self) -> Spread:
        """Tokens computed again over prompt and output tokens, a run."""
        return Spread.of(
            [
                (run.num_recomputed_tokens or 0) / (run.num_prompt_tokens + run.num_output_tokens)
                for run in self.runs
            ]
        )

    @property
    def tokens_per_s(self) -> Spread:
        """Output tokens a second of its runs."""
        return Spread.of([run.output_tokens_per_s for run in self.runs])

    @property
    def is_within(self) -> bool:
        """Whether the scheduler's bound held."""
        return self.recomputed.max < MAX_RECOMPUTED


def measure_preemption(
    engines: Mapping[int, AsyncEngine],
    workload: Workload,
    concurrency: int,
    repeat: int,
    progress: ReportProgress,
) -> list[PreemptionCost]:
    """engines: by the percentage of their caches. All run the same items of a repeat."""
    clients = {percent: EngineClient(engine) for percent, engine in engines.items()}
    runs: dict[int, list[Measurement]] = {percent: [] for percent in engines}
    errors: dict[int, set[str]] = {percent: set() for percent in engines}
    for number in range(-1, repeat):  # -1 warms up
        for done, (percent, client) in enumerate(clients.items()):
            progress("caches", max(0, number) * len(clients) + done, repeat * len(clients))
            result = asyncio.run(drive(client, workload.run(number), concurrency))
            errors[percent].update(t.error for t in result.timings if t.error is not None)
            if number >= 0:
                runs[percent].append(measure(result))
    progress("caches", 1, 1)
    return [
        PreemptionCost(
            percent,
            engines[percent].stats().num_blocks,
            tuple(runs[percent]),
            tuple(sorted(errors[percent])),
        )
        for percent in engines
    ]


def preemption_table(found: Sequence[PreemptionCost]) -> Table:
    """One row a size."""
    table = Table(caption=f"again: of the tokens of use, always below {MAX_RECOMPUTED}")
    for title in ("cache, %", "blocks", "preemptions", "again", "output tokens/s"):
        table.add_column(title, justify="right")
    for one in found:
        table.add_row(
            str(one.percent),
            str(one.num_blocks),
            spread(Spread.of([run.num_preemptions or 0 for run in one.runs])),
            spread(one.recomputed),
            spread(one.tokens_per_s),
        )
    return table
