"""Who asks what: every wish is drawn from a seed, and so are the moments at which clients hang up."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from tests.soak.client import Client
from tests.soak.record import Record, Wish
from tests.soak.site import BASE, NUM_LAYERS, SoakSite

MAX_TOKENS = 24
MAX_PAUSE_S = 0.5
"""Of a client between two requests."""
ZIPF = 0.9


@dataclass(frozen=True, slots=True)
class Access:
    """A key's text, and what it may be refused with."""

    text: str
    refusals: frozenset[int] = frozenset()


Keys = dict[str, Access]


class Drawer:
    """Draws wishes for one client."""

    def __init__(self, site: SoakSite, num_prompts: int, rng: random.Random) -> None:
        self._site = site
        self._num_prompts = num_prompts
        self._rng = rng
        self._weights = [1 / (rank + 1) ** ZIPF for rank in range(len(site.names))]
        order = list(site.names)
        random.Random(len(order)).shuffle(
            order
        )  # the same for all: moving ones are asked often too
        self._order = order

    def draw(self, keys: Mapping[str, Access]) -> Wish:
        rng = self._rng
        is_base = rng.random() < 0.08
        name = BASE if is_base else rng.choices(self._order, self._weights)[0]
        depth: int | str = rng.choice([*range(NUM_LAYERS + 1), "full", "auto", "none"])
        allowed: set[int] = set()
        if is_base:
            depth = rng.choice([0, "none"])
        elif name in self._site.moving:
            allowed.add(404)
        if rng.random() < 0.01:
            depth, allowed = NUM_LAYERS + 1, allowed | {400}
        key = rng.choice(list(keys))
        wish = Wish(
            name=name,
            depth=depth,
            prompts=tuple(rng.sample(range(self._num_prompts), rng.choice([1] * 9 + [2]))),
            max_tokens=rng.randint(1, MAX_TOKENS),
            priority=rng.choice([-1, 0, 0, 0, 1]),
            is_stream=rng.random() < 0.5,
            key=key,
            allowed=frozenset(allowed) | keys[key].refusals,
        )
        if rng.random() < 0.05:
            wish = replace(wish, is_greedy=False, n=2)
        manner = rng.random()
        if manner < 0.2:
            moment = rng.uniform(0, MAX_TOKENS) if wish.is_stream else rng.expovariate(4)
            wish = replace(wish, leaves_after=moment)
        elif manner < 0.3 and wish.is_stream:
            wish = replace(wish, reads_slowly=True)
        return wish


async def ask_on(
    client: Client,
    drawer: Drawer,
    keys: Keys,
    rng: random.Random,
    name: str,
    is_over: Callable[[], bool],
    take: Callable[[Record], None],
) -> None:
    """One client until the time is over; what it has asked by then it still reads."""
    for number in count():
        if is_over():
            return
        wish = drawer.draw(keys)
        take(await client.ask(f"{name}-{number}", wish, keys[wish.key].text))
        await asyncio.sleep(rng.uniform(0, MAX_PAUSE_S))


async def ask_all(
    client: Client,
    site: SoakSite,
    keys: Keys,
    prompts: Sequence[str],
    *,
    num_clients: int,
    seed: int,
    is_over: Callable[[], bool],
    take: Callable[[Record], None],
) -> None:
    """All clients until the time is over."""
    async with asyncio.TaskGroup() as group:
        for number in range(num_clients):
            rng = random.Random(f"{seed}/{number}")
            drawer = Drawer(site, len(prompts), rng)
            group.create_task(
                ask_on(client, drawer, keys, rng, f"c{number}", is_over, take), name=f"c{number}"
            )
