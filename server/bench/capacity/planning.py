"""How many replicas a day needs: the fewest with which the busiest minutes meet the target.

Every number of replicas is simulated with the same requests. The fleet has been up for a while: host memory
holds what it would, by popularity, and the first `WARM_UP_S` of the simulation are not counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean
from typing import Any

from server import affinity
from server.bench.capacity.arrivals import (
    DAY_S,
    Burst,
    Day,
    Zipf,
    adapter_name,
    day_rows,
    zipf_workload,
)
from server.bench.capacity.hardware import Hardware, Target
from server.bench.capacity.routing import ROUTINGS, Routing
from server.bench.capacity.simulation import Fleet, Outcome, replica_name, simulate
from server.bench.load import LoadResult
from server.bench.measure import Percentiles, measure
from server.bench.workload import Workload

WARM_UP_S = 30.0
WINDOW_S = 90.0
MAX_REPLICAS = 64


@dataclass(frozen=True, slots=True)
class Demand:
    """Of a day. peak: the busiest rate over the mean; in the middle of it half as many again for 20 s."""

    requests: int = 1_000_000
    num_adapters: int = 10_000
    exponent: float = 1.0
    peak: float = 1.8


@dataclass(frozen=True, slots=True)
class Case:
    """One way to serve a demand. slots: `--max-loras`. depth_share: of the layers, for every request."""

    demand: Demand
    routing: Routing
    slots: int
    depth_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """A case with so many replicas, in the busiest minutes."""

    num_replicas: int
    first: Percentiles
    gap: Percentiles
    tokens_per_s: float
    slot_hit_rate: float
    host_hit_rate: float
    mean_utilisation: float
    max_utilisation: float
    rows_per_step: float

    def meets(self, target: Target) -> bool:
        """Both bounds, of 95 in 100."""
        assert self.first.p95 is not None
        assert self.gap.p95 is not None
        return self.first.p95 <= target.first_s and self.gap.p95 <= target.gap_s


@dataclass(frozen=True, slots=True)
class Plan:
    """The fewest replicas, and one fewer; None where even `MAX_REPLICAS` do not meet the target."""

    hardware: str
    case: Case
    enough: Served | None
    fewer: Served | None


def plan_from(content: dict[str, Any]) -> Plan:
    """What `asdict` gave."""
    case = content["case"]
    served = (_served_from(content[name]) for name in ("enough", "fewer"))
    demand = Demand(**case["demand"])
    return Plan(content["hardware"], Case(**case | {"demand": demand}), *served)


def _served_from(content: dict[str, Any] | None) -> Served | None:
    if content is None:
        return None
    spreads = {name: Percentiles(**content[name]) for name in ("first", "gap")}
    return Served(**content | spreads)


def busiest(demand: Demand, hardware: Hardware, depth_share: float, seed: int) -> Workload:
    """The requests that are simulated: about the highest rate of the day, with the burst."""
    day = Day(demand.requests / DAY_S, demand.peak)
    start_s = day.peak_s - (WARM_UP_S + WINDOW_S) / 2
    burst = Burst(start_s + WARM_UP_S + WINDOW_S / 3, 20.0, 1.5)
    rows = day_rows(
        replace(day, burst=burst),
        start_s,
        WARM_UP_S + WINDOW_S,
        hardware.prompt,
        hardware.output,
        seed,
    )
    depth = max(1, round(depth_share * hardware.replica.num_layers))
    zipf = Zipf(demand.num_adapters, demand.exponent)
    return zipf_workload(rows, zipf, depth, 1, seed)


def plan(
    hardware: Hardware, case: Case, seed: int, progress: Callable[[], None] = lambda: None
) -> Plan:
    """Search up from where every replica would be busy all the time."""
    workload = busiest(case.demand, hardware, case.depth_share, seed)
    tried: dict[int, Served] = {}

    def at(num_replicas: int) -> Served:
        if num_replicas not in tried:
            tried[num_replicas] = serve(hardware, case, num_replicas, workload, seed)
            progress()
        return tried[num_replicas]

    # So many are known to be too few; from so many on it is tried, three halves more at a time.
    low, high = 0, max(1, math.floor(least(hardware, workload)))
    while not at(high).meets(hardware.target):
        if high >= MAX_REPLICAS:
            return Plan(hardware.name, case, None, at(high))
        low, high = high, min(max(high + 1, high * 5 // 4), MAX_REPLICAS)
    if not low and high > 1 and not at(high - 1).meets(hardware.target):
        low = high - 1
    while high - low > 1:
        middle = (low + high) // 2
        if at(middle).meets(hardware.target):
            high = middle
        else:
            low = middle
    return Plan(hardware.name, case, at(high), at(low) if low else None)


def least(hardware: Hardware, workload: Workload) -> float:
    """Replicas that the window's tokens keep busy if every step is full of rows: fewer cannot do it."""
    costs, settings = hardware.costs.step, hardware.replica
    rows = settings.max_num_seqs
    decode_s = costs.base / rows + costs.decode_row
    seconds = sum(
        row.output_len * decode_s + row.prompt_len * costs.prefill_token for row in workload.rows
    )
    return seconds / (WARM_UP_S + WINDOW_S)


def serve(
    hardware: Hardware, case: Case, num_replicas: int, workload: Workload, seed: int
) -> Served:
    """One simulation; what arrived while the fleet warmed up is not counted in its latencies."""
    settings = replace(hardware.replica, max_loras=case.slots)
    fleet = Fleet(num_replicas, case.routing, settings)
    held = [
        held_names(case, num_replicas, index, settings.max_cpu_loras)
        for index in range(num_replicas)
    ]
    outcome = simulate(workload, fleet, hardware.costs, seed, held)
    return summary(outcome, num_replicas)


def held_names(case: Case, num_replicas: int, index: int, max_cpu_loras: int) -> tuple[str, ...]:
    """The most popular adapters: all alike, or with affinity those whose home this replica is."""
    names = map(adapter_name, range(case.demand.num_adapters))
    ids = [replica_name(number) for number in range(num_replicas)]

    def is_home(name: str) -> bool:
        if case.routing != "affinity":
            return True
        return max(ids, key=lambda one: affinity.weight(name, one)) == ids[index]

    return tuple(reversed(list(islice(filter(is_home, names), max_cpu_loras))))


def summary(outcome: Outcome, num_replicas: int, warm_up_s: float = WARM_UP_S) -> Served:
    """Numbers of what came after the warm-up; counts are of all."""
    result = outcome.result
    counted = tuple(timing for timing in result.timings if timing.start_s >= warm_up_s)
    measured = measure(LoadResult(result.duration_s - warm_up_s, counted))
    total, utilisations = outcome.total, outcome.utilisations
    return Served(
        num_replicas,
        measured.time_to_first_token_s,
        measured.inter_token_s,
        measured.output_tokens_per_s,
        total.slot_hit_rate or 0.0,
        total.host_hit_rate or 0.0,
        mean(utilisations),
        max(utilisations),
        total.num_rows / total.num_steps,
    )


def cases(demand: Demand = Demand()) -> Sequence[Case]:
    """The four routings; then one thing changed at a time, by affinity."""
    found = [Case(demand, routing, 64) for routing in ROUTINGS]
    found += [Case(replace(demand, exponent=value), "affinity", 64) for value in (0.7, 1.3)]
    found += [Case(demand, "affinity", slots) for slots in (8, 16, 128)]
    found += [Case(demand, "affinity", slots, 0.5) for slots in (64, 128)]
    return found
