"""The simulator beside closed forms, and beside the engine whose policy it claims to have."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from random import Random
from statistics import mean
from typing import Any

import pytest
import simpy

from server.bench.capacity import replica as replica_module
from server.bench.capacity.arrivals import Zipf, adapter_name, zipf_workload
from server.bench.capacity.cost import Costs, LoadCosts, StepCosts
from server.bench.capacity.replica import REFUSED, Replica, ReplicaSettings
from server.bench.capacity.routing import ROUTINGS
from server.bench.capacity.simulation import Fleet, Outcome, simulate
from server.bench.capacity.step import StepShape
from server.bench.capacity.timed_steps import StepTimer
from server.bench.load import Timing
from server.bench.mix import Choice
from server.bench.trace import TraceRow
from server.bench.workload import Workload
from tests.tiny import Tiny, open_tiny

ONE_AT_A_TIME = ReplicaSettings(num_layers=4, max_num_seqs=1, max_num_batched_tokens=10_000)
SECOND = Costs(StepCosts(base=1.0))
NUM_QUEUED = 8_000
LOAD = 0.6


def base_only(rows: list[TraceRow]) -> Workload:
    return Workload(tuple(rows), (Choice(),) * len(rows), 1, 0)


def poisson(rate: float, number: int, seed: int) -> list[float]:
    random = Random(seed)
    return list(accumulate(random.expovariate(rate) for _ in range(number)))


def one_replica(
    workload: Workload, settings: ReplicaSettings, costs: Costs, seed: int = 0
) -> Outcome:
    return simulate(workload, Fleet(1, "random", settings, None), costs, seed)


def mean_wait_s(outcome: Outcome, service_s: float) -> float:
    """From arrival to the start of service, of requests of one step each."""
    spent = mean(timing.end_s - timing.start_s for timing in outcome.result.timings)
    return spent - service_s


def wait_m_d_1(load: float) -> float:
    """Pollaczek and Khinchine, in service times, with service that never varies."""
    return load / (2 * (1 - load))


def wait_m_m_1(load: float) -> float:
    """The same, with exponential service."""
    return load / (1 - load)


@pytest.fixture(scope="module")
def m_d_1() -> Outcome:
    rows = [TraceRow(at_s, 1, 1) for at_s in poisson(LOAD, NUM_QUEUED, 1)]
    return one_replica(base_only(rows), ONE_AT_A_TIME, SECOND)


@pytest.fixture(scope="module")
def m_m_1() -> Outcome:
    """Prompts of exponential length whose tokens are all of the cost; no chunk is cut."""
    random = Random(102)  # not that of the gaps: long ones would come before long prompts
    rows = [
        TraceRow(at_s, max(1, round(random.expovariate(1 / 200))), 1)
        for at_s in poisson(LOAD, NUM_QUEUED, 2)
    ]
    costs = Costs(StepCosts(prefill_token=1 / 200))
    return one_replica(base_only(rows), ONE_AT_A_TIME, costs)


def test_waits_are_those_of_a_queue_with_constant_service(m_d_1: Outcome) -> None:
    assert mean_wait_s(m_d_1, 1.0) == pytest.approx(wait_m_d_1(LOAD), rel=0.1)


def test_waits_are_those_of_a_queue_with_exponential_service(m_m_1: Outcome) -> None:
    assert mean_wait_s(m_m_1, 1.0) == pytest.approx(wait_m_m_1(LOAD), rel=0.1)


def test_the_other_queue_is_told_from_it(m_d_1: Outcome, m_m_1: Outcome) -> None:
    assert mean_wait_s(m_d_1, 1.0) != pytest.approx(wait_m_m_1(LOAD), rel=0.3)
    assert mean_wait_s(m_m_1, 1.0) != pytest.approx(wait_m_d_1(LOAD), rel=0.3)


def test_a_batch_waits_less_than_one_at_a_time(m_d_1: Outcome) -> None:
    rows = [TraceRow(timing.start_s, 1, 1) for timing in m_d_1.result.timings]
    wide = ReplicaSettings(num_layers=4, max_num_seqs=64)
    assert mean_wait_s(one_replica(base_only(rows), wide, SECOND), 1.0) < 0.6


def test_utilisation_is_load(m_d_1: Outcome) -> None:
    (utilisation,) = m_d_1.utilisations
    assert utilisation == pytest.approx(LOAD, rel=0.03)


def test_littles_law_by_somebody_who_looks_in_from_time_to_time() -> None:
    """How many there are, looked at at random times, against rate times time spent."""
    env = simpy.Environment()
    replica = Replica(env, "r", ReplicaSettings(num_layers=4, max_num_seqs=8), SECOND)
    timings: list[Timing] = []
    seen: list[int] = []

    def arrive() -> Iterator[simpy.Event]:
        random = Random(3)
        while True:
            yield env.timeout(random.expovariate(1.2))
            timing = Timing(env.now)
            timings.append(timing)
            replica.submit(TraceRow(env.now, 1, random.randint(1, 6)), Choice(), timing)

    def look() -> Iterator[simpy.Event]:
        random = Random(4)
        while True:
            yield env.timeout(random.expovariate(1.0))
            seen.append(replica.num_ongoing)

    env.process(arrive())  # type: ignore[arg-type]
    env.process(look())  # type: ignore[arg-type]
    env.run(until=4000.0)
    spent = [timing.end_s - timing.start_s for timing in timings if timing.end_s]
    rate = len(timings) / 4000.0
    assert mean(seen) == pytest.approx(rate * mean(spent), rel=0.06)
    assert mean(seen) > 3


def che_hit_rate(shares: list[float], size: int) -> float:
    """Of an LRU cache: Che, Tung and Wang (2002), by bisection for the characteristic time."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        held = sum(1 - math.exp(-share * middle) for share in shares)
        low, high = (middle, high) if held < size else (low, middle)
    return sum(share * (1 - math.exp(-share * low)) for share in shares)


def lru_misses(names: list[str], size: int) -> int:
    held: OrderedDict[str, None] = OrderedDict()
    misses = 0
    for name in names:
        misses += name not in held
        held[name] = None
        held.move_to_end(name)
        if len(held) > size:
            held.popitem(last=False)
    return misses


@pytest.fixture(scope="module")
def cached() -> tuple[Workload, Outcome]:
    """Requests one after the other for 200 adapters on 20 slots, 60 of them in host memory."""
    rows = [TraceRow(10.0 * number, 1, 1) for number in range(6_000)]
    workload = zipf_workload(rows, Zipf(200, 0.9), None, 1, 5)
    settings = ReplicaSettings(num_layers=4, max_loras=20, max_cpu_loras=60)
    return workload, one_replica(
        workload, settings, Costs(StepCosts(base=0.1), LoadCosts(1.0, 0.5))
    )


def test_host_memory_is_an_lru_cache(cached: tuple[Workload, Outcome]) -> None:
    workload, outcome = cached
    names = [choice.adapter or "" for choice in workload.choices]
    assert outcome.total.num_reads == lru_misses(names, 60)
    assert outcome.total.num_reads != lru_misses(names, 59)
    hits = outcome.total.host_hit_rate
    assert hits == pytest.approx(che_hit_rate(Zipf(200, 0.9).shares, 60), abs=0.02)
    assert hits != pytest.approx(che_hit_rate(Zipf(200, 0.9).shares, 45), abs=0.02)


def test_slots_are_an_lru_cache_within_it(cached: tuple[Workload, Outcome]) -> None:
    workload, outcome = cached
    names = [choice.adapter or "" for choice in workload.choices]
    # What left host memory is other content when it comes back, and has to leave its slot first.
    assert outcome.total.num_slot_loads == lru_misses(names, 20)
    assert outcome.total.slot_hit_rate == pytest.approx(
        che_hit_rate(Zipf(200, 0.9).shares, 20), abs=0.02
    )


def test_an_adapter_that_comes_in_costs_its_time(cached: tuple[Workload, Outcome]) -> None:
    workload, outcome = cached
    first_s = [timing.piece_s[0] - timing.start_s for timing in outcome.result.timings]
    seen: set[str] = set()
    for choice, seconds in zip(workload.choices, first_s, strict=True):
        if choice.adapter not in seen:
            assert seconds == pytest.approx(0.1 + 1.0 + 0.5)
        seen.add(choice.adapter or "")
    assert min(first_s) == pytest.approx(0.1)


def mixed_rows(number: int, rate: float, seed: int) -> list[TraceRow]:
    random = Random(seed)
    return [
        TraceRow(at_s, random.randint(1, 200), random.randint(1, 40))
        for at_s in poisson(rate, number, seed)
    ]


STEP = StepCosts(0.01, 0.0008, 4e-6, 0.003, 0.001, 5e-7, 5e-5, 5e-4)
COSTS = Costs(STEP, LoadCosts(0.1, 0.01))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_request_is_answered_once_in_order_and_whole(routing: Any) -> None:
    rows = mixed_rows(400, 12.0, 6)
    workload = zipf_workload(rows, Zipf(50, 1.0), None, 1, 6)
    outcome = simulate(workload, Fleet(3, routing, ReplicaSettings(4), 16), COSTS, 6)
    assert len(outcome.result.timings) == len(rows)
    for row, timing in zip(rows, outcome.result.timings, strict=True):
        assert timing.error is None
        assert len(timing.piece_s) == timing.num_output_tokens == row.output_len
        assert row.arrival_s < timing.piece_s[0]
        assert all(earlier < later for earlier, later in pairwise(timing.piece_s))
        assert timing.piece_s[-1] == timing.end_s
    total = outcome.total
    assert total.num_requests == len(rows)
    assert total.num_preemptions == 0
    # The last token of a completion goes through no step.
    assert total.num_tokens == sum(row.prompt_len + row.output_len - 1 for row in rows)


def test_without_room_tokens_are_computed_again_and_nothing_is_lost() -> None:
    rows = mixed_rows(120, 1000.0, 7)
    small = ReplicaSettings(4, kv_tokens=512)
    outcome = one_replica(base_only(rows), small, COSTS)
    assert outcome.total.num_preemptions > 0
    assert outcome.total.num_tokens > sum(row.prompt_len + row.output_len - 1 for row in rows)
    assert [timing.num_output_tokens for timing in outcome.result.timings] == [
        row.output_len for row in rows
    ]


def test_more_than_may_wait_are_refused_and_counted() -> None:
    rows = mixed_rows(60, 1000.0, 8)
    few = ReplicaSettings(4, max_num_seqs=4, max_num_waiting=6)
    outcome = one_replica(base_only(rows), few, COSTS)
    refused = [timing for timing in outcome.result.timings if timing.error == REFUSED]
    assert outcome.total.num_refused == len(refused) > 0
    assert all(not timing.piece_s for timing in refused)
    answered = [timing for timing in outcome.result.timings if timing.error is None]
    assert len(answered) + len(refused) == len(rows)
    # A router that knows how many each may have keeps the rest to itself.
    patient = simulate(base_only(rows), Fleet(1, "random", few, 10), COSTS, 0)
    assert patient.total.num_refused == 0


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    workload = zipf_workload(mixed_rows(150, 12.0, 9), Zipf(50, 1.0), None, 1, 9)
    fleet = Fleet(3, "random", ReplicaSettings(4))
    first, again, other = (simulate(workload, fleet, COSTS, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_affinity_finds_more_in_slots_than_a_lot() -> None:
    workload = zipf_workload(mixed_rows(600, 10.0, 10), Zipf(60, 0.8), None, 1, 10)
    rates = {}
    for routing in ROUTINGS:
        outcome = simulate(workload, Fleet(4, routing, ReplicaSettings(4)), COSTS, 0)
        rates[routing] = outcome.total.slot_hit_rate or 0.0
    assert rates["affinity"] > max(rates[name] for name in ROUTINGS if name != "affinity") + 0.1


def test_turns_are_even_and_the_least_busy_is_asked() -> None:
    workload = base_only(mixed_rows(400, 20.0, 11))
    turns = simulate(workload, Fleet(4, "round-robin", ReplicaSettings(4)), COSTS, 0)
    assert [one.num_requests for one in turns.replicas] == [100] * 4
    least = simulate(workload, Fleet(4, "least-ongoing", ReplicaSettings(4)), COSTS, 0)
    lot = simulate(workload, Fleet(4, "random", ReplicaSettings(4)), COSTS, 0)
    waits = [
        mean(timing.piece_s[0] - timing.start_s for timing in one.result.timings)
        for one in (least, lot)
    ]
    assert waits[0] < waits[1]


def test_a_depth_costs_its_share() -> None:
    rows = [TraceRow(0.0, 1, 1)]
    costs = Costs(StepCosts(base=1.0, lora_token=0.4, lora_adapter=0.2))
    seconds = [
        one_replica(Workload(tuple(rows), (Choice("a0", depth),), 1, 0), ONE_AT_A_TIME, costs)
        .result.timings[0]
        .end_s
        for depth in (None, 2, 0)
    ]
    assert seconds == pytest.approx([1.6, 1.3, 1.0])


@pytest.mark.parametrize("num_blocks", [64, 24])
def test_its_steps_are_the_engines(
    tiny: Tiny, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests, by the real engine and on paper: every step has the same shape."""
    random = Random(12)
    asked: list[tuple[int, int, str | None, int | None]] = [(40, 3, None, None)]
    for _ in range(24):
        adapter = random.choice((None, "a", "b", "c"))
        depth = None if adapter is None else random.choice((None, 1))
        asked.append((random.randint(1, 40), random.randint(1, 20), adapter, depth))
    shapes: list[StepShape] = []
    with open_tiny(
        tiny, "a", "b", "c", num_blocks=num_blocks, max_loras=2, prefix_caching=False
    ) as core:
        timer = StepTimer(core, 0)
        for number, request in enumerate(asked):
            timer.add(*request)
            if number == 0:  # the others come while it runs
                timer.step()
                shapes += timer.shapes
        while core.has_work:
            timer.step()
            shapes += timer.shapes
        stats, num_preemptions = core.stats(), core.scheduler.num_preemptions
        settings = ReplicaSettings(
            core.info.num_layers,
            max_loras=2,
            max_num_seqs=core.scheduler.max_num_seqs,
            max_num_batched_tokens=core.scheduler.max_num_batched_tokens,
            kv_tokens=stats.num_blocks * stats.block_size,
            block_size=stats.block_size,
        )
    planned: list[StepShape] = []
    shape_of = replica_module.shape_of

    def note(*arguments: Any) -> StepShape:
        planned.append(shape_of(*arguments))
        return planned[-1]

    monkeypatch.setattr(replica_module, "shape_of", note)
    rows = [
        TraceRow(0.0 if number == 0 else 0.1, prompt_len, output_len)
        for number, (prompt_len, output_len, _, _) in enumerate(asked)
    ]
    choices = tuple(Choice(adapter, depth) for _, _, adapter, depth in asked)
    workload = Workload(tuple(rows), choices, 1, 0)

    def simulated(settings: ReplicaSettings) -> Outcome:
        planned.clear()
        return simulate(workload, Fleet(1, "random", settings, None), SECOND, 0, [["a", "b", "c"]])

    outcome = simulated(settings)
    assert planned == shapes
    assert outcome.total.num_preemptions == num_preemptions
    assert (num_preemptions > 0) == (num_blocks == 24)
    simulated(replace(settings, max_loras=3))
    assert planned != shapes
    simulated(replace(settings, max_num_batched_tokens=15))
    assert planned != shapes


def test_names_are_those_of_the_benchmark() -> None:
    assert [adapter_name(index) for index in (0, 12)] == ["a0", "a12"]
