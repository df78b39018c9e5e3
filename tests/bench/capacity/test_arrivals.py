"""Arrivals of a day and adapters by Zipf's law."""

from collections import Counter
from random import Random

import pytest

from server.bench.capacity.arrivals import DAY_S, Burst, Day, Zipf, day_rows, zipf_workload
from server.bench.capacity.planning import Case, Demand, held_names
from server.bench.workload import Lengths


def test_a_day_has_its_requests_and_its_peak() -> None:
    day = Day(mean_per_s=0.5, peak=1.8)
    times = day.arrivals(0.0, DAY_S, Random(0))
    assert len(times) == pytest.approx(0.5 * DAY_S, rel=0.02)
    assert times == sorted(times)
    hours = Counter(int(at_s // 3600) for at_s in times)
    assert hours[15] / 3600 == pytest.approx(0.9, rel=0.06)
    assert hours[3] / 3600 == pytest.approx(0.1, rel=0.2)
    flat = Counter(int(at_s // 3600) for at_s in Day(0.5).arrivals(0.0, DAY_S, Random(0)))
    assert max(flat.values()) < 1.2 * min(flat.values())


def test_a_burst_is_in_its_place() -> None:
    day = Day(5.0, burst=Burst(1000.0, 200.0, 3.0))
    times = day.arrivals(900.0, 600.0, Random(1))
    inside = [at_s for at_s in times if 100 <= at_s < 300]
    assert len(inside) / 200 == pytest.approx(15.0, rel=0.1)
    assert (len(times) - len(inside)) / 400 == pytest.approx(5.0, rel=0.1)


def test_zipfs_shares_are_drawn() -> None:
    zipf = Zipf(1000, 1.0)
    assert sum(zipf.shares) == pytest.approx(1)
    assert zipf.shares[0] == pytest.approx(10 * zipf.shares[9])
    drawn = Counter(zipf.draw(40_000, Random(2)))
    for rank in (0, 1, 9):
        assert drawn[rank] / 40_000 == pytest.approx(zipf.shares[rank], rel=0.12)
    assert Zipf(3, 0.0).shares == pytest.approx([1 / 3] * 3)


def test_a_workload_is_its_seeds() -> None:
    def make(seed: int) -> object:
        rows = day_rows(Day(3.0), 0.0, 60.0, Lengths(4, 9), Lengths(2, 5), seed)
        assert {row.prompt_len for row in rows} <= set(range(4, 10))
        return zipf_workload(rows, Zipf(20, 1.0), 3, 100, seed)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_host_memory_holds_the_popular_and_with_affinity_ones_own() -> None:
    demand = Demand(num_adapters=100)
    alike = held_names(Case(demand, "random", 8), 4, 1, 10)
    assert alike == tuple(f"a{index}" for index in reversed(range(10)))
    own = [set(held_names(Case(demand, "affinity", 8), 4, index, 1000)) for index in range(4)]
    assert set.union(*own) == {f"a{index}" for index in range(100)}
    assert sum(map(len, own)) == 100
