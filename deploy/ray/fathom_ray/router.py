"""Which replica gets a request: one that holds its adapter, unless it is much busier than another.

Runs in every proxy, which share nothing but what Serve tells them. Each replica says once a second which
adapters it has on its device and in host memory (`Replica.record_routing_stats`). For a name that no replica
holds, all proxies come to the same choice without asking each other: replicas are ranked by a hash of
name and replica (rendezvous hashing, Thaler and Ravishankar 1998), so that a replica that comes or goes
moves its own share of the names alone. So a cold adapter is read once, though many ask for it at the
same moment. One that is asked for more than its replica can take spills over to the next in its rank,
which holds it from then on.

The adapter's name is a request's multiplexed model id, a header that `hint` sets; without one it is the less
busy of two by lot, as Serve itself would have it.
"""

import random
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

MAX_IMBALANCE = 8
"""Requests that a replica may have more than the least busy one before its adapters do not count."""

PLACES = ("device", "host")
"""Nearest first."""


class AdapterAffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray need not be there
    """Ranks all replicas for each request; Serve takes the first that has room."""

    def initialize_state(self, max_imbalance: int = MAX_IMBALANCE, **_: Any) -> None:
        """Called by Serve with `request_router_kwargs`."""
        self._max_imbalance = max_imbalance

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they should be tried; of one rank the least busy."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # once all have been tried
        # Serve takes the first of those that are as little busy as each other.
        candidate_replicas = random.sample(candidate_replicas, len(candidate_replicas))
        name = pending_request.metadata.multiplexed_model_id if pending_request else ""
        if not name:
            return [candidate_replicas[:2], candidate_replicas[2:]]
        num_ongoing = {
            replica.replica_id: self._replica_queue_len_cache.get(replica.replica_id) or 0
            for replica in candidate_replicas
        }
        most = min(num_ongoing.values(), default=0) + self._max_imbalance
        free = [r for r in candidate_replicas if num_ongoing[r.replica_id] <= most]
        busy = [r for r in candidate_replicas if num_ongoing[r.replica_id] > most]
        return [*ranks(name, free), busy]


def ranks(name: str, replicas: list[RunningReplica]) -> list[list[RunningReplica]]:
    """Those that hold the adapter, by how near it is; then one by one those that would read it."""
    held: list[list[RunningReplica]] = [[] for _ in PLACES]
    without: list[RunningReplica] = []
    for replica in replicas:
        place = place_of(name, replica.routing_stats)
        (without if place is None else held[place]).append(replica)
    without.sort(key=lambda replica: weight(name, replica.replica_id.unique_id), reverse=True)
    return [*held, *([replica] for replica in without)]


def place_of(name: str, routing_stats: dict[str, Any]) -> int | None:
    """The index in PLACES of where a replica said that it has the adapter."""
    for index, place in enumerate(PLACES):
        if name in routing_stats.get(place, ()):
            return index
    return None


def weight(name: str, replica: str) -> bytes:
    """Of a replica for a name, the same in every process."""
    return blake2b(f"{name}\0{replica}".encode(), digest_size=8).digest()
