"""The order in which replicas are tried, by what they hold and how busy they are."""

import asyncio
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tests.ray.fleet import DEPLOY


class ReplicaName(NamedTuple):
    unique_id: str


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DEPLOY))
    from fathom_ray.router import AdapterAffinityRouter

    def choose(name: str, replicas: dict[str, tuple[int, dict[str, Any]]]) -> list[list[str]]:
        """Replica -> how many requests it has and what it says it holds; ranks, by name."""
        router = AdapterAffinityRouter.__new__(AdapterAffinityRouter)  # without Serve's connections
        router.initialize_state(max_imbalance=2)
        candidates = [
            SimpleNamespace(replica_id=ReplicaName(id), routing_stats=stats)
            for id, (_, stats) in replicas.items()
        ]
        router._replica_queue_len_cache = SimpleNamespace(
            get=lambda replica: replicas[replica.unique_id][0]
        )
        request = SimpleNamespace(
            metadata=SimpleNamespace(multiplexed_model_id=name), routing_context=SimpleNamespace()
        )
        chosen = asyncio.run(router.choose_replicas(candidates, request))
        return [[replica.replica_id.unique_id for replica in rank] for rank in chosen if rank]

    return choose


def test_who_holds_it_nearest_comes_first_and_who_is_much_busier_last(choose: Any) -> None:
    device, host = {"device": ["a"], "host": ["a"]}, {"device": [], "host": ["a"]}
    ranks = choose("a", {"x": (0, {}), "h": (2, host), "d": (2, device), "full": (3, device)})
    assert ranks == [["d"], ["h"], ["x"], ["full"]]
    assert sorted(choose("a", {"d": (0, device), "e": (1, device)})[0]) == ["d", "e"]


def test_a_name_that_nobody_holds_has_an_order_of_its_own(choose: Any) -> None:
    replicas = {name: (0, {}) for name in "uvwxyz"}
    orders = {name: choose(name, replicas) for name in map(str, range(40))}
    assert all(orders[name] == choose(name, replicas) for name in orders)
    assert len({order[0][0] for order in orders.values()}) == len(replicas)
    # Without one of them, only the names that were its own go elsewhere.
    del replicas["u"]
    for name, order in orders.items():
        assert choose(name, replicas) == [rank for rank in order if rank != ["u"]]


def test_without_a_name_two_by_lot_are_tried_first(choose: Any) -> None:
    replicas = {name: (0, {}) for name in "xyz"}
    firsts = [choose("", replicas)[0] for _ in range(60)]
    assert all(len(first) == 2 for first in firsts)
    assert {first[0] for first in firsts} == set(replicas)
