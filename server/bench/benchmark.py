"""`fathom bench`: the engine and its baselines over the same work, side by side, in numbered steps.

1. Plan: settle the model, its adapters and the load (`plan`).
2. Measure the engine's memory, alone in a process.
3. Load the baselines and the engine, here or as a server behind HTTP.
4. Check that the engine's answers are right; a wrong one ends the benchmark.
5. Warm up each side, then run them in turn: engine, baseline, engine, baseline.
6. Report.

All sides of one repeat get the same requests. The baselines have a process of their own, and the sides take
turns, so each has the machine and its threads to itself while it runs; with `--http` the server too.
"""

import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from server.bench.baseline_process import RemoteBaseline, baseline_process
from server.bench.check import CheckResult, check, sample
from server.bench.in_process import EngineClient
from server.bench.load import LoadResult, drive
from server.bench.measure import Measurement, measure, ratio
from server.bench.memory import Memory, measure_alone, weight_bytes
from server.bench.options import BenchOptions
from server.bench.over_http import HttpClient
from server.bench.plan import Plan, api_key, plan_local, plan_remote, refuse_contradictions
from server.bench.report import Report, show, write
from server.bench.server_process import ServerProcess, server_process
from server.bench.workload import WorkItem
from server.config import Settings
from server.engine import brief_thread
from server.loading import load_engine, progress_on_stderr
from server.logs import configure_logs

ENGINE = "fathom"
# Numbers of runs that are not timed; their prompts must not be those of a timed one.
_WARMUP_RUN, _CHECK_RUN, _MEMORY_RUN = -1, -2, -3

Side = Callable[[Sequence[WorkItem]], LoadResult]


@dataclass(frozen=True, slots=True)
class Target:
    """The engine as one side, and what can be seen of it."""

    run: Side
    client: EngineClient | None = None
    process: ServerProcess | None = None


def bench(settings: Settings, options: BenchOptions) -> int:
    """Run a benchmark and print it; 1 where a check or a request failed."""
    configure_logs("warning")
    refuse_contradictions(settings, options)
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory:
        report = run_benchmark(settings, options, Path(directory))
    show(report)
    if options.json is not None:
        write(report, options.json)
    is_wrong = report.check is not None and not report.check.is_passed
    return int(is_wrong or bool(report.errors))


def run_benchmark(settings: Settings, options: BenchOptions, directory: Path) -> Report:
    """Steps 1 to 5."""
    if options.url is not None:
        plan = plan_remote(settings, options)
    else:
        with progress_on_stderr() as progress:
            # Random weights are drawn by threads that must not stay.
            plan = brief_thread.run(lambda: plan_local(settings, options, directory, progress))
    memory = None
    if options.memory and options.url is None and not options.http:
        items = plan.workload.run(_MEMORY_RUN)
        memory = measure_alone(plan.settings, items, plan.concurrency)
    runs: dict[str, list[Measurement]] = {}
    errors: list[str] = []
    checked: CheckResult | None = None
    names, reference_name = needed_baselines(plan, options)
    with (
        baseline_process(
            names, plan.settings, plan.workload.choices, options.baseline_cache
        ) as loaded,
        target(plan, options) as engine,
    ):
        baselines = [loaded[name] for name in plan.baselines]
        reference = loaded.get(reference_name)
        if reference is not None and engine.client is not None:
            items = sample(plan.workload.run(_CHECK_RUN), options.concurrency)
            # It looks through whole vocabularies, by threads that must not stay either.
            checked = brief_thread.run(
                partial(check, engine.client, reference, items, plan.settings.dtype)
            )
        if checked is None or checked.is_passed:
            sides = {ENGINE: engine.run} | {
                baseline.name: static_side(baseline, plan, options) for baseline in baselines
            }
            runs = run_sides(sides, plan, options, errors)
        if options.memory and engine.process is not None:
            memory = server_memory(plan.settings, engine.process)
    ratios = [ratio(side.name, runs[ENGINE], runs[side.name]) for side in baselines if runs]
    return Report(
        command=["fathom", *sys.argv[1:]],
        model=model_facts(plan, options),
        workload=plan.facts,
        method=method_facts(options),
        runs=runs,
        ratios=ratios,
        memory=memory,
        check=checked,
        errors=sorted(set(errors)),
    )


def needed_baselines(plan: Plan, options: BenchOptions) -> tuple[list[str], str]:
    """Which baselines to load, and the check's reference, which is loaded only for a check."""
    has_adapters = any(choice.adapter is not None for choice in plan.workload.choices)
    reference = "peft" if has_adapters else "generate"
    if not options.check:
        return list(plan.baselines), ""
    return list(dict.fromkeys([*plan.baselines, reference])), reference


@contextmanager
def target(plan: Plan, options: BenchOptions) -> Iterator[Target]:
    """The engine in this process, a server process of its own, or a server elsewhere."""
    if options.url is not None:
        yield Target(partial(_run_http, plan, options.url))
    elif options.http:
        with server_process(plan.settings) as process:
            yield Target(partial(_run_http, plan, process.url), process=process)
    else:
        engine = load_engine(plan.settings)
        try:
            client = EngineClient(engine)
            yield Target(
                lambda items: asyncio.run(drive(client, items, plan.concurrency)), client=client
            )
        finally:
            engine.shutdown()


def static_side(baseline: RemoteBaseline, plan: Plan, options: BenchOptions) -> Side:
    """A baseline as a side."""
    is_open = plan.concurrency is None
    return lambda items: baseline.run_batches(items, options.concurrency, is_open=is_open)


def run_sides(
    sides: dict[str, Side], plan: Plan, options: BenchOptions, errors: list[str]
) -> dict[str, list[Measurement]]:
    """Warm up, then every repeat of every side."""
    num_warmup = options.concurrency if options.warmup is None else options.warmup
    order = [(number, name) for number in range(options.repeat) for name in sides]
    if not options.interleave:
        order.sort(key=lambda pair: list(sides).index(pair[1]))
    runs: dict[str, list[Measurement]] = {name: [] for name in sides}
    with progress_on_stderr() as progress:
        for done, side in enumerate(sides.values()):
            progress("warm-up", done, len(sides))
            if num_warmup:
                side(plan.workload.run(_WARMUP_RUN)[:num_warmup])
        progress("warm-up", len(sides), len(sides))
        for done, (number, name) in enumerate(order):
            progress("runs", done, len(order))
            result = sides[name](plan.workload.run(number))
            errors.extend(timing.error for timing in result.timings if timing.error is not None)
            runs[name].append(measure(result))
        progress("runs", len(order), len(order))
    return runs


def server_memory(settings: Settings, process: ServerProcess) -> Memory | None:
    """The server process's, where both its peak and its cache are known."""
    peak = process.peak_rss_bytes
    if peak is None or settings.kv_cache_bytes is None or settings.device != "cpu":
        return None
    return Memory(
        where="resident in the server process",
        peak_bytes=peak,
        start_bytes=None,
        weight_bytes=weight_bytes(settings),
        kv_cache_bytes=settings.kv_cache_bytes,
    )


def model_facts(plan: Plan, options: BenchOptions) -> dict[str, Any]:
    """What was served."""
    if options.url is not None:
        return {"name": plan.served.base, "url": options.url, "dtype": "the server's dtype"}
    settings = plan.settings
    return {
        "name": plan.served.base,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "device": settings.device,
        "num_adapters": len(plan.served.adapters),
        "rank": options.rank if options.num_adapters else None,
        "max_model_len": plan.served.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "kv_cache_bytes": settings.kv_cache_bytes,
    }


def method_facts(options: BenchOptions) -> dict[str, Any]:
    """How it was measured."""
    if options.url is not None:
        engine = "a server elsewhere, over HTTP"
    elif options.http:
        engine = "a server process on this machine, over loopback HTTP"
    else:
        engine = "in this process"
    return {
        "engine": engine,
        "baselines": "in a process of their own, in static batches of the concurrency; sorted by length in a"
        " closed loop, whatever has arrived in an open one",
        "baseline_cache": options.baseline_cache,
        "repeat": options.repeat,
        "interleave": options.interleave,
        "warmup": options.concurrency if options.warmup is None else options.warmup,
        "memory": "the engine alone in a process, one run of the load",
    }


def _run_http(plan: Plan, url: str, items: Sequence[WorkItem]) -> LoadResult:
    async def run() -> LoadResult:
        key = api_key(plan.settings)
        async with HttpClient(url, plan.served.base, api_key=key) as client:
            return await drive(client, items, plan.concurrency)

    return asyncio.run(run())
