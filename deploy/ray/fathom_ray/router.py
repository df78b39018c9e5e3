"""Which replica gets a request: one that holds its adapter, unless it is much busier than another.

Runs in every proxy, which share nothing but what Serve tells them. Each replica says once a second which
adapters it has on its device and in host memory (`Replica.record_routing_stats`). The order is that of
`server.affinity`, at which all proxies arrive without asking each other: a cold adapter is read once, though
many ask for it at the same moment. One that is asked for more than its replica can take spills over to the
next in its rank, which holds it from then on.

The adapter's name is a request's multiplexed model id, a header that `hint` sets; without one it is the less
busy of two by lot, as Serve itself would have it.
"""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.affinity import MAX_IMBALANCE, in_order


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
        return in_order(
            name,
            candidate_replicas,
            lambda replica: self._replica_queue_len_cache.get(replica.replica_id) or 0,
            self._max_imbalance,
        )
