"""One replica as predicted beside one server as measured, under the same arrivals.

The server is a `fathom serve` process on the loopback address, asked over HTTP in an open loop by the clock
of its engine (`engine_clock`), because the machine has other work. The prediction uses step costs that were
measured before; nothing of a run goes into its prediction.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random
from statistics import median
from typing import Any

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

from server.bench.capacity.arrivals import Day, Zipf, adapter_name, day_rows, zipf_workload
from server.bench.capacity.cost import Costs
from server.bench.capacity.engine_clock import EngineClock, drive_by
from server.bench.capacity.replica import ReplicaSettings
from server.bench.capacity.simulation import Fleet, simulate
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

    slowdown: of the server's steps, the wall's clock over what the engine's thread computed.
    """

    cell: Cell
    slowdown: float
    predicted: Side
    measured: Side


def run_from(content: dict[str, Any]) -> Run:
    """What `asdict` gave."""
    return Run(
        Cell(**content["cell"]),
        content["slowdown"],
        Side(**content["predicted"]),
        Side(**content["measured"]),
    )


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
    costs: Costs,
    vocab_size: int,
    num_adapters: Sequence[int],
    loads: Sequence[float],
    *,
    duration_s: float,
    rounds: int,
    seed: int,
    progress: ReportProgress,
) -> list[Run]:
    """Every cell in turn, `rounds` times, against one server.

    settings: of the server, with as many adapters as the most of `num_adapters`.
    """
    cells = [
        Cell(number, load, load * capacity(costs, replica, number, seed))
        for number in num_adapters
        for load in loads
    ]
    names = list(settings.adapter)  # by popularity
    held = names[: settings.max_cpu_loras][::-1]
    runs: list[Run] = []
    with server_process(settings) as server:
        _warm_up(server, names, seed)
        engine = busiest_thread(server.pid)
        total = rounds * len(cells)
        for done in range(total):
            progress("runs", done, total)
            cell = cells[done % len(cells)]
            run_seed = seed + done // len(cells)
            rows = day_rows(Day(cell.rate), 0.0, duration_s, PROMPT, OUTPUT, run_seed)
            workload = zipf_workload(
                rows, Zipf(cell.num_adapters, ZIPF), None, vocab_size, run_seed
            )
            in_slots = names[: min(cell.num_adapters, settings.max_loras)][::-1]
            fleet = Fleet(1, "random", replica, None)
            outcome = simulate(workload, fleet, costs, run_seed, [held], in_slots)
            counts = outcome.total
            predicted = _side(
                measure(outcome.result), counts.num_slot_loads, counts.num_steps, counts.busy_s
            )
            clock = EngineClock(server.pid, engine)
            runs.append(_run(server, clock, workload, done, cell, predicted))
        progress("runs", total, total)
    return runs


def _run(
    server: ServerProcess,
    clock: EngineClock,
    workload: Workload,
    number: int,
    cell: Cell,
    predicted: Side,
) -> Run:
    async def run() -> LoadResult:
        async with HttpClient(server.url) as client:
            return await drive_by(clock, client, workload.run(number))

    before, cpu_s = _metrics(server.url), clock.cpu_s()
    result = asyncio.run(run())
    cpu_s = clock.cpu_s() - cpu_s
    gained = {name: value - before.get(name, 0.0) for name, value in _metrics(server.url).items()}
    num_loads = round(gained["fathom_adapter_loads_total", "device"])
    measured = _side(measure(result), num_loads, round(gained["fathom_steps_total", ""]), cpu_s)
    return Run(cell, gained["fathom_step_seconds_sum", ""] / cpu_s, predicted, measured)


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


def _metrics(url: str) -> dict[tuple[str, str], float]:
    """Values by name and place."""
    text = httpx2.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    return {
        (sample.name, sample.labels.get("place", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def busiest_thread(pid: int) -> int:
    """Of a server that has worked, its engine's."""
    threads = psutil.Process(pid).threads()
    return int(max(threads, key=lambda thread: thread.user_time + thread.system_time).id)


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


def by_cell(runs: Sequence[Run]) -> list[list[Run]]:
    """The rounds of each load, by adapters and load; another seed's rate is a little another."""

    def key(run: Run) -> tuple[int, float]:
        return run.cell.num_adapters, run.cell.load

    return [list(own) for _, own in groupby(sorted(runs, key=key), key=key)]


def middle(runs: Sequence[Run], side: str, quantity: str) -> float:
    """Median of the runs."""
    return median(float(getattr(getattr(run, side), quantity)) for run in runs)
