"""What one long prompt holds at once as it is computed in chunks: what is allocated meanwhile, counted in the
allocator's events, and what programs compute in.

Steps run on this thread, without an engine's own, because the profiler sees one thread. On a CPU. The
cache is as large for every length, and short requests before the first have made what is made once,
programs among it, so that what grows is what a step needs for its context.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import psutil
from rich.filesize import decimal
from rich.table import Table

from server.bench.allocation import peak_bytes
from server.config import Settings
from server.engine.core import EngineCore
from server.engine.request import LoraSelection, Request, SamplingParams
from server.loading import ReportProgress

_NUM_OUTPUT_TOKENS = 4
MAX_GROWTH = 1.25
"""Of the peak, over the growth of the length: what grows with its square has 4 where the length has 2."""


@dataclass(frozen=True, slots=True)
class LongContext:
    """One length. peak_bytes: over what was there before; rss_bytes: of the process, after it."""

    num_tokens: int
    num_steps: int
    seconds: float
    peak_bytes: int
    rss_bytes: int


def measure_long_context(
    settings: Settings, lengths: Sequence[int], adapter: str | None, progress: ReportProgress
) -> list[LongContext]:
    """One request of each length. adapter: of all of them, at full depth; None: the base model."""
    core = EngineCore.from_settings(settings, progress)
    try:
        for name, path in settings.adapter_paths().items():
            core.registry.load(name, path)
        lora = core.registry.select(adapter or core.info.name, None)
        chunk = settings.max_num_batched_tokens
        # Until programs are believed; of other tokens each, which the prefix cache does not have.
        for number, length in enumerate((chunk + 1, chunk + 1, chunk // 2 + 1)):
            _run(core, lora, length, -number)
        found = []
        for done, length in enumerate(lengths, start=1):
            progress("prompts", done - 1, len(lengths))
            found.append(_measure(core, lora, length, done))
        progress("prompts", len(lengths), len(lengths))
        return found
    finally:
        core.close()


def is_linear(found: Sequence[LongContext]) -> bool:
    """Whether no peak grows faster than its length, from each to the next."""
    return all(
        after.peak_bytes / before.peak_bytes <= MAX_GROWTH * after.num_tokens / before.num_tokens
        for before, after in pairwise(found)
    )


def long_context_table(found: Sequence[LongContext]) -> Table:
    """One row a length."""
    table = Table(caption="peak: allocated at once over weights and cache")
    for title in ("tokens", "steps", "seconds", "peak", "a token", "resident"):
        table.add_column(title, justify="right")
    for one in found:
        table.add_row(
            str(one.num_tokens),
            str(one.num_steps),
            f"{one.seconds:.1f}",
            decimal(one.peak_bytes),
            decimal(one.peak_bytes // one.num_tokens),
            decimal(one.rss_bytes),
        )
    return table


def _measure(core: EngineCore, lora: LoraSelection, length: int, number: int) -> LongContext:
    before = core.stats().num_steps
    began = time.perf_counter()
    peak = peak_bytes(lambda: _run(core, lora, length, number))
    if core.runner.replay is not None:
        peak += core.runner.replay.num_bytes
    seconds = time.perf_counter() - began
    rss_bytes = psutil.Process().memory_info().rss
    return LongContext(length, core.stats().num_steps - before, seconds, peak, rss_bytes)


def _run(core: EngineCore, lora: LoraSelection, length: int, number: int) -> None:
    prompt = [(7 * position + number) % core.info.vocab_size for position in range(length)]
    sampling = SamplingParams(_NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    core.add(Request(f"long-{number}", tuple(prompt), sampling, lora))
    while core.has_work:
        for output in core.step():
            if output.error is not None:
                raise output.error
