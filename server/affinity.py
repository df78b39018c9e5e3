"""Which replica of a fleet should get an adapter's request, from what each said that it holds.

One that holds it, unless it is much busier than another. For a name that no replica holds, everybody who asks
comes to the same answer without asking each other: replicas are ranked by a hash of name and replica
(rendezvous hashing, Thaler and Ravishankar 1998), so that a replica that comes or goes moves its own share
of the names alone. Knows no router: Ray Serve's uses it (`deploy/ray`), and so does the simulator that says
how many replicas a load needs (`server.bench.capacity`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

MAX_IMBALANCE = 8
"""Requests that a replica may have more than the least busy one before its adapters do not count."""

PLACES = ("device", "host")
"""Nearest first."""

Held = Mapping[str, Collection[str]]
"""Adapters by place."""


class Holder(Protocol):
    """A replica as a router knows it."""

    @property
    def replica_id(self) -> Any:
        """Its `unique_id` is the same wherever it is seen."""

    @property
    def routing_stats(self) -> Any:
        """Its own word of what it holds: `Held`."""


Replica = TypeVar("Replica", bound=Holder)


def in_order(
    name: str,
    replicas: Sequence[Replica],
    num_ongoing: Callable[[Replica], int],
    max_imbalance: int = MAX_IMBALANCE,
) -> list[list[Replica]]:
    """Ranks in the order in which they should be tried; of one rank the least busy."""
    ongoing = {replica.replica_id: num_ongoing(replica) for replica in replicas}
    most = min(ongoing.values(), default=0) + max_imbalance
    free = [replica for replica in replicas if ongoing[replica.replica_id] <= most]
    busy = [replica for replica in replicas if ongoing[replica.replica_id] > most]
    return [*ranks(name, free), busy]


def ranks(name: str, replicas: Sequence[Replica]) -> list[list[Replica]]:
    """Those that hold the adapter, by how near it is; then one by one those that would read it."""
    held: list[list[Replica]] = [[] for _ in PLACES]
    without: list[Replica] = []
    for replica in replicas:
        place = place_of(name, replica.routing_stats)
        (without if place is None else held[place]).append(replica)
    without.sort(key=lambda replica: weight(name, replica.replica_id.unique_id), reverse=True)
    return [*held, *([replica] for replica in without)]


def place_of(name: str, routing_stats: Held) -> int | None:
    """The index in PLACES of where a replica said that it has the adapter."""
    for index, place in enumerate(PLACES):
        if name in routing_stats.get(place, ()):
            return index
    return None


def weight(name: str, replica: str) -> bytes:
    """Of a replica for a name, the same in every process."""
    return blake2b(f"{name}\0{replica}".encode(), digest_size=8).digest()
