"""One replica as predicted beside one server as measured, under the same arrivals.

The server is a `fathom serve` process on the loopback address, asked over HTTP in an open loop. The
prediction uses step costs that were measured before, and one number of each run: how many times as long as
those costs the engine's steps take by the clock just before and just after it (`slowdown`), because the
machine has other work. Nothing of a run itself goes into its prediction.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from statistics import mean, median

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

from server.bench.capacity.arrivals import Day, Zipf, adapter_name, day_rows, zipf_workload
from server.bench.capacity.cost import Costs, scaled
from server.bench.capacity.measurement import probe
from server.bench.capacity.replica import ReplicaSettings
from server.bench.capacity.simulation import Fleet, simulate
from server.bench.capacity.timed_steps import StepTimer
from server.bench.load import LoadResult, drive
from server.bench.measure import Measurement, measure
from server.bench.over_http import HttpClient
from server.bench.server_process import ServerProcess, server_process
from server.bench.trace import TraceRow
from server.bench.workload import Lengths, Workload, make_workload
from server.config import Settings
from server.loading import ReportProgress

PROMPT, OUTPUT = Lengths(16, 112), Lengths(16, 112)
"""Tokens of a request: 64 on average."""

ZIPF = 1.0
_WARMUP_REQUESTS = 96


@dataclass(frozen=True, slots=True)
class Cell:
    """A load: so many adapters asked for at so many requests a second."""

    num_adapters: int
    load: float
    """Of what the simulator says that the replica can do, when the comparison began."""
    rate: float


@dataclass(frozen=True, slots=True)
class Side:
    """What a run was like, on paper or measured. step_s: mean of a step."""

    num_answered: int
    num_failed: int
    first_p50_s: float
    first_p95_s: float
    gap_p50_s: float
    gap_p95_s: float
    latency_p50_s: float
    tokens_per_s: float
    slot_hit_rate: float
    num_steps: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One cell, once.

    slowdown: see above. engine_share: processor time of the server's engine over the clock, of its steps.
    """

    cell: Cell
    slowdown: float
    engine_share: float
    predicted: Side
    measured: Side


def capacity(costs: Costs, settings: ReplicaSettings, num_adapters: int, seed: int) -> float:
    """Requests a second of one replica that always has enough of them."""
    rows = [
        TraceRow(0.0, row.prompt_len, row.output_len)
        for row in day_rows(Day(1.0), 0.0, 600.0, PROMPT, OUTPUT, seed)
    ]
    workload = zipf_workload(rows, Zipf(num_adapters, ZIPF), None, 1, seed)
    names = [[adapter_name(index) for index in range(min(num_adapters, settings.max_cpu_loras))]]
    outcome = simulate(workload, Fleet(1, "random", settings, None), costs, seed, names)
    return len(rows) / outcome.result.duration_s


def compare(
    settings: Settings,
    replica: ReplicaSettings,
    timer: StepTimer,
    costs: Costs,
    num_adapters: Sequence[int],
    loads: Sequence[float],
    *,
    duration_s: float,
    rounds: int,
    seed: int,
    progress: ReportProgress,
) -> list[Run]:
    """Every cell in turn, `rounds` times, against one server.

    settings: of the server, with as many adapters as the most of `num_adapters`. timer: over a core of the
    same model in this process, which is idle while the server runs.
    """
    on_device = list(settings.adapter)[: settings.max_loras]
    now = scaled(costs, probe(timer, costs.step, on_device))
    cells = [
        Cell(number, load, load * capacity(now, replica, number, seed))
        for number in num_adapters
        for load in loads
    ]
    held = list(settings.adapter)[: settings.max_cpu_loras]  # as the server begins
    runs: list[Run] = []
    with server_process(settings) as server:
        _warm_up(server, list(settings.adapter), seed)
        total = rounds * len(cells)
        for done in range(total):
            progress("runs", done, total)
            cell = cells[done % len(cells)]
            run_seed = seed + done // len(cells)
            rows = day_rows(Day(cell.rate), 0.0, duration_s, PROMPT, OUTPUT, run_seed)
            workload = zipf_workload(
                rows, Zipf(cell.num_adapters, ZIPF), None, timer.vocab_size, run_seed
            )
            before = probe(timer, costs.step, on_device)
            measured, engine_share = _measure(server, workload, done)
            slowdown = mean((before, probe(timer, costs.step, on_device)))
            predicted = _predict(workload, replica, scaled(costs, slowdown), held, run_seed)
            runs.append(Run(cell, slowdown, engine_share, predicted, measured))
        progress("runs", total, total)
    return runs


def _predict(
    workload: Workload,
    replica: ReplicaSettings,
    costs: Costs,
    held: Sequence[str],
    seed: int,
) -> Side:
    outcome = simulate(workload, Fleet(1, "random", replica, None), costs, seed, [held])
    total = outcome.total
    return _side(measure(outcome.result), total.num_slot_loads, total.num_steps, total.busy_s)


def _measure(server: ServerProcess, workload: Workload, number: int) -> tuple[Side, float]:
    with _watched(server) as watched:
        result = asyncio.run(_drive(server, workload, number))
    measurement = measure(result)
    side = _side(measurement, watched.num_loads, watched.num_steps, watched.steps_s)
    return side, watched.engine_cpu_s / watched.steps_s if watched.steps_s else 0.0


async def _drive(
    server: ServerProcess, workload: Workload, number: int, concurrency: int | None = None
) -> LoadResult:
    async with HttpClient(server.url) as client:
        return await drive(client, workload.run(number), concurrency)


def _warm_up(server: ServerProcess, adapters: Sequence[str], seed: int) -> None:
    """Every number of rows, until its steps are replayed."""
    random = Random(f"{seed}/warm-up")
    rows = [TraceRow(0.0, 16, random.randint(2, 64)) for _ in range(_WARMUP_REQUESTS)]
    mix = zipf_workload(rows, Zipf(min(4, len(adapters)), 0.0), None, 100, seed)
    base = make_workload(rows, ((mix.choices[0], 1.0),), 100, seed)
    for number, workload in enumerate((mix, base)):
        asyncio.run(_drive(server, workload, -1 - number, concurrency=64))


@dataclass(slots=True)
class _Watched:
    num_steps: int = 0
    steps_s: float = 0.0
    num_loads: int = 0
    engine_cpu_s: float = 0.0


@contextmanager
def _watched(server: ServerProcess) -> Iterator[_Watched]:
    """What the server counts while the block lasts; the busiest thread is the engine's."""
    found = _Watched()
    before, threads = _metrics(server.url), _thread_seconds(server.pid)
    yield found
    after, now = _metrics(server.url), _thread_seconds(server.pid)
    gained = {name: value - before[name] for name, value in after.items() if name in before}
    found.num_steps = round(gained["fathom_steps_total", ""])
    found.steps_s = gained["fathom_step_seconds_sum", ""]
    found.num_loads = round(gained["fathom_adapter_loads_total", "device"])
    found.engine_cpu_s = max(seconds - threads.get(key, 0.0) for key, seconds in now.items())


def _metrics(url: str) -> dict[tuple[str, str], float]:
    """Values by name and place."""
    text = httpx2.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    return {
        (sample.name, sample.labels.get("place", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _thread_seconds(pid: int) -> dict[int, float]:
    threads = psutil.Process(pid).threads()
    return {thread.id: thread.user_time + thread.system_time for thread in threads}


def _side(measured: Measurement, num_loads: int, num_steps: int, steps_s: float) -> Side:
    def seconds(value: float | None) -> float:
        return 0.0 if value is None else value

    num_answered = measured.num_requests - measured.num_failed
    return Side(
        num_answered,
        measured.num_failed,
        seconds(measured.time_to_first_token_s.p50),
        seconds(measured.time_to_first_token_s.p95),
        seconds(measured.inter_token_s.p50),
        seconds(measured.inter_token_s.p95),
        seconds(measured.latency_s.p50),
        measured.output_tokens_per_s,
        1 - num_loads / measured.num_requests,
        num_steps,
        steps_s / num_steps if num_steps else 0.0,
    )


QUANTITIES = {
    "first_p50_s": "first token p50, ms",
    "first_p95_s": "first token p95, ms",
    "gap_p50_s": "between tokens p50, ms",
    "gap_p95_s": "between tokens p95, ms",
    "latency_p50_s": "whole request p50, ms",
    "step_s": "mean step, ms",
    "num_steps": "steps",
    "tokens_per_s": "tokens/s",
    "slot_hit_rate": "slot hit rate",
}
"""Fields of `Side` that are compared."""


def errors(runs: Sequence[Run], quantity: str) -> list[float]:
    """Predicted over measured less one, of each run."""
    return [
        getattr(run.predicted, quantity) / getattr(run.measured, quantity) - 1
        for run in runs
        if getattr(run.measured, quantity)
    ]


def middle(runs: Sequence[Run], side: str, quantity: str) -> float:
    """Median of the runs."""
    return median(float(getattr(getattr(run, side), quantity)) for run in runs)
