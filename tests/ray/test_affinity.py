"""Adapters are read less often than where requests go by load alone; counted by the replicas."""

import random

import httpx

from tests.ray.fleet import ADAPTERS, HINT, KEY, REPLICA, Fleet, ask, deploy, say, undeploy

NUM_REQUESTS = 240
NUM_REPLICAS = 2


def zipf_mix(seed: int) -> list[str]:
    """Names by rank: the n-th is asked for 1/n as often as the first."""
    weights = [1 / rank for rank in range(1, len(ADAPTERS) + 1)]
    return random.Random(seed).choices(ADAPTERS, weights, k=NUM_REQUESTS)


def num_loads(fleet: Fleet) -> dict[str, float]:
    """Adapters brought onto the device so far, by replica."""
    found: dict[str, float] = {}
    while len(found) < NUM_REPLICAS:
        response = httpx.get(f"{fleet.url}/metrics", timeout=60)
        found[response.headers[REPLICA]] = sum(
            float(line.split()[-1])
            for line in response.text.splitlines()
            if line.startswith("fathom_adapter_loads_total{") and 'place="device"' in line
        )
    return found


def hit_rate(fleet: Fleet, *, is_random: bool) -> float:
    """The share of the mix that found its adapter on the device; replicas are new and hold nothing.

    is_random: each request names an adapter of its own to the router, whose choice is then by lot.
    """
    undeploy()
    deploy()
    for number, name in enumerate(zipf_mix(seed=1)):
        hint = {HINT: f"request-{number}"} if is_random else {}
        assert ask(fleet, name, max_tokens=1, headers=KEY | hint).status_code == 200
    num = sum(num_loads(fleet).values())
    assert num >= len(set(zipf_mix(seed=1)))  # each at least once
    return 1 - num / NUM_REQUESTS


def test_more_requests_find_their_adapter_on_the_device(fleet: Fleet) -> None:
    at_random = hit_rate(fleet, is_random=True)
    by_affinity = hit_rate(fleet, is_random=False)
    say(f"found on the device: {by_affinity:.1%} by affinity, {at_random:.1%} at random")
    assert by_affinity > at_random + 0.1
