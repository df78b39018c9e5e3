"""Which replica gets a request, by four policies."""

from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import Literal, get_args

from server import affinity
from server.bench.capacity.replica import Replica

Routing = Literal["random", "round-robin", "least-ongoing", "affinity"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)

Ranks = Callable[[str], Sequence[Sequence[Replica]]]
"""An adapter's name to replicas in the order in which they are tried; of one rank the least busy."""


def policy(routing: Routing, replicas: Sequence[Replica], random: Random) -> Ranks:
    """One router that sees every replica's number of requests at once, and what they hold once told."""
    if routing == "random":
        return lambda _: [[replica] for replica in random.sample(replicas, len(replicas))]
    if routing == "round-robin":
        turns = count()
        return lambda _: _rotated(replicas, next(turns) % len(replicas))
    if routing == "least-ongoing":
        return lambda _: [replicas]
    return lambda name: affinity.in_order(name, replicas, lambda replica: replica.num_ongoing)


def choose(
    ranks: Sequence[Sequence[Replica]], max_ongoing: int | None, random: Random
) -> Replica | None:
    """The first that has room, as Ray Serve chooses; among equals by lot."""
    for rank in ranks:
        free = [one for one in rank if max_ongoing is None or one.num_ongoing < max_ongoing]
        if free:
            least = min(replica.num_ongoing for replica in free)
            return random.choice([one for one in free if one.num_ongoing == least])
    return None


def _rotated(replicas: Sequence[Replica], first: int) -> list[list[Replica]]:
    return [[replica] for replica in [*replicas[first:], *replicas[:first]]]
