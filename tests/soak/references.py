"""What each content says at each depth, found before the load by the same server with nothing else to do.

A prompt after which two tokens are nearly as likely is not used: how a step is composed may decide
between them. So every answer under load must be the reference, without exception.
"""

import asyncio
import random
import string
from collections.abc import Sequence

import httpx

from tests.soak.record import References
from tests.soak.site import BASE_CONTENT, NUM_LAYERS, Content, SoakSite

MIN_GAP = 1e-3
"""Between the best two log-probabilities; steps composed differently differ by a hundredth of it."""
NUM_AT_ONCE = 4
SHARED = "Every prompt begins with these words, so that blocks are shared: "


class Undecided(RuntimeError):
    """Too few prompts have one answer."""


def draw_prompts(num_prompts: int, seed: int) -> list[str]:
    """Half of them share a beginning longer than a block."""
    rng = random.Random(seed)
    letters = string.ascii_letters + "  "
    return [
        SHARED * (number % 2) + "".join(rng.choices(letters, k=rng.randint(4, 24)))
        for number in range(num_prompts)
    ]


def tasks_of(site: SoakSite) -> list[tuple[Content, int]]:
    """Depth 0 is the base model, whatever the adapter."""
    contents = site.contents[1:]
    return [
        (BASE_CONTENT, 0),
        *((content, depth) for content in contents for depth in range(1, NUM_LAYERS + 1)),
    ]


async def find_references(
    http: httpx.AsyncClient,
    admin: httpx.AsyncClient,
    site: SoakSite,
    prompts: Sequence[str],
    max_tokens: int,
) -> References:
    """Ask for all of them. A second content is asked under a name that is unloaded after."""
    found: References = {}
    turns = asyncio.Semaphore(NUM_AT_ONCE)

    async def one(content: Content, model: str, depth: int) -> None:
        async with turns:
            body = {
                "model": model, "prompt": list(prompts), "max_tokens": max_tokens, "temperature": 0,
                "ignore_eos": True, "logprobs": 2, "lora_depth": depth,
            }  # fmt: skip
            response = await http.post("/v1/completions", json=body)
        response.raise_for_status()
        for number, choice in enumerate(response.json()["choices"]):
            if min(map(gap, choice["logprobs"]["top_logprobs"])) >= MIN_GAP:
                found[content, depth, number] = choice["text"]

    async def adapter(content: Content) -> None:
        name, version = content
        model = name
        if version:
            model = f"{name}-second"
            load = {"lora_name": model, "lora_path": site.path(content)}
            (await admin.post("/v1/load_lora_adapter", json=load)).raise_for_status()
        await asyncio.gather(*(one(content, model, d) for d in range(1, NUM_LAYERS + 1)))
        if version:
            gone = await admin.post("/v1/unload_lora_adapter", json={"lora_name": model})
            gone.raise_for_status()

    await one(BASE_CONTENT, BASE_CONTENT[0], 0)
    for content in site.contents[1:]:
        await adapter(content)
    if len(found) < len(tasks_of(site)) * len(prompts) / 2:
        raise Undecided(f"only {len(found)} prompts have an answer without near ties")
    return found


def gap(tops: dict[str, float]) -> float:
    best, second = sorted(tops.values(), reverse=True)[:2]
    return best - second
