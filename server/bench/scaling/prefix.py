"""What the prefix cache is worth where requests share a system prompt, for each adapter and depth.

Two engines over the same model, with the cache and without, take turns. A run is one choice of adapter
and depth: its first request finds nothing, the others find the blocks of the system prompt. Every
repeat has a system prompt of its own, the same for all choices, so that a block that one choice found
and another computed would show as a hit that is too many.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from rich.table import Table

from server.bench.in_process import EngineClient
from server.bench.load import drive
from server.bench.measure import Measurement, Spread, measure
from server.bench.mix import Choice
from server.bench.scaling.report import spread
from server.bench.workload import WorkItem
from server.engine.async_engine import AsyncEngine
from server.loading import ReportProgress

WITH, WITHOUT = "with", "without"


@dataclass(frozen=True, slots=True)
class PrefixLoad:
    """Lengths in tokens. num_requests: of a run, the first one not among them."""

    system_len: int
    prompt_len: int
    output_len: int
    num_requests: int
    concurrency: int

    @property
    def max_len(self) -> int:
        """Of one request."""
        return self.system_len + self.prompt_len + self.output_len

    def items(self, choice: Choice, vocab_size: int, repeat: int, seed: int) -> list[WorkItem]:
        """The first request and the others."""
        shared = Random(f"{seed}/system/{repeat}")
        system = [shared.randrange(vocab_size) for _ in range(self.system_len)]
        own = Random(f"{seed}/own/{repeat}/{choice}")
        return [
            WorkItem(
                (*system, *(own.randrange(vocab_size) for _ in range(self.prompt_len))),
                self.output_len,
                choice,
            )
            for _ in range(1 + self.num_requests)
        ]


@dataclass(frozen=True, slots=True)
class PrefixGain:
    """One choice.

    num_shared: tokens in whole blocks of the system prompt. cold_hits: cached tokens of the first
        requests; is_base: at depth 0, and not the first choice there, it finds another adapter's.
    hit_rate: cached over prompt tokens of the other requests. runs: of these, by engine.
    """

    choice: str
    num_shared: int
    prompt_len: int
    is_base: bool
    cold_hits: tuple[int, ...]
    hit_rate: Spread
    runs: Mapping[str, Sequence[Measurement]]

    @property
    def first_token_s(self) -> Mapping[str, Spread]:
        """The median request's time to its first token, by engine."""
        return {
            name: Spread.of([run.time_to_first_token_s.p50 or 0.0 for run in runs])
            for name, runs in self.runs.items()
        }

    @property
    def gain(self) -> Spread:
        """How many times as long the first token takes without the cache, repeat by repeat."""
        pairs = zip(self.first_token_s[WITHOUT].each, self.first_token_s[WITH].each, strict=True)
        return Spread.of([without / cached for without, cached in pairs])

    @property
    def is_as_expected(self) -> bool:
        """Whether the whole blocks of the system prompt were found each time, and nothing else ever."""
        expected_cold = self.num_shared if self.is_base else 0
        expected = self.num_shared / self.prompt_len
        return set(self.cold_hits) == {expected_cold} and set(self.hit_rate.each) == {expected}


def measure_prefix(
    engines: Mapping[str, AsyncEngine],
    choices: Sequence[Choice],
    load: PrefixLoad,
    repeat: int,
    seed: int,
    progress: ReportProgress,
) -> list[PrefixGain]:
    """engines: `WITH` and `WITHOUT`, whose caches hold every system prompt of a repeat."""
    clients = {name: EngineClient(engine) for name, engine in engines.items()}
    block_size = engines[WITH].stats().block_size
    vocab_size = engines[WITH].info.vocab_size
    runs: dict[tuple[Choice, str], list[Measurement]] = {}
    cold: dict[Choice, list[int]] = {choice: [] for choice in choices}
    total = repeat * len(choices)
    for number in range(-1, repeat):  # -1 warms up
        for done, choice in enumerate(choices):
            progress("system prompts", max(0, number) * len(choices) + done, total)
            first, *others = load.items(choice, vocab_size, number, seed)
            for name, client in clients.items():
                begun = measure(asyncio.run(drive(client, [first], 1)))
                measured = measure(asyncio.run(drive(client, others, load.concurrency)))
                if number >= 0:
                    runs.setdefault((choice, name), []).append(measured)
                    if name == WITH:
                        cold[choice].append(begun.num_cached_tokens)
    progress("system prompts", total, total)
    num_shared = load.system_len // block_size * block_size
    first_base = next((choice for choice in choices if choice.depth == 0), None)
    return [
        PrefixGain(
            choice=str(choice),
            num_shared=num_shared,
            prompt_len=load.system_len + load.prompt_len,
            is_base=choice.depth == 0 and choice != first_base,
            cold_hits=tuple(cold[choice]),
            hit_rate=Spread.of(
                [run.num_cached_tokens / run.num_prompt_tokens for run in runs[choice, WITH]]
            ),
            runs={name: tuple(runs[choice, name]) for name in engines},
        )
        for choice in choices
    ]


def prefix_table(found: Sequence[PrefixGain]) -> Table:
    """One row a choice."""
    table = Table(caption="gain: without over with, of the median request; median (least to most)")
    for title in ("", "hit rate", "first token with, ms", "without, ms", "gain"):
        table.add_column(title, justify="right")
    for one in found:
        times = one.first_token_s
        table.add_row(
            one.choice,
            f"{one.hit_rate.median:.3f}",
            spread(times[WITH], 1000),
            spread(times[WITHOUT], 1000),
            spread(one.gain),
        )
    return table
