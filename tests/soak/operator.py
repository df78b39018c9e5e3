"""Whoever runs the server meanwhile: moves adapters, recalibrates, makes and revokes keys."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

import httpx

from tests.soak.record import References, Timeline, Timelines
from tests.soak.site import NUM_LAYERS, Content, SoakSite
from tests.soak.traffic import Access, Keys

MIN_SAMPLES = 32
"""The fewest that a calibration concludes from."""
JOB_POLL_S = 0.2
LENGTH = 4
"""Tokens of a sample's completion."""
FINAL = ("succeeded", "failed", "cancelled")


class Operator:
    """Holds the admin key. `problems` are answers that no operator should get."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        site: SoakSite,
        keys: Keys,
        *,
        pause_s: float,
        seed: int,
        is_over: Callable[[], bool],
    ) -> None:
        self._http = http
        self._site = site
        self._keys = keys
        self._pause_s = pause_s
        self._rng = random.Random(f"{seed}/operator")
        self._is_over = is_over
        self.timelines: Timelines = {name: Timeline((name, 0)) for name in site.names}
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []

    async def make_keys(self) -> None:
        """One without limits, one that is often over its limit, one for few adapters and depths."""
        names = list(self._site.names[: len(self._site.names) // 2])
        await self._make_key("free")
        await self._make_key("slow", {429}, requests_per_minute=60, tokens_per_minute=3000)
        await self._make_key("narrow", {403}, adapters=names, max_depth=NUM_LAYERS - 1)
        await self._make_key("changing", {401})

    async def work(self, prompts: Sequence[str], references: References) -> None:
        """All kinds of work at once until the time is over."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._move())
            group.create_task(self._calibrate(prompts, references))
            group.create_task(self._change_keys())

    async def _move(self) -> None:
        """Each change is one that its adapter can take now."""
        while not self._is_over():
            name = self._rng.choice(self._site.moving)
            line = self.timelines[name]
            now = line.latest
            if now is None:
                await self._load(name, (name, self._rng.randint(0, 1)), "load")
            elif self._rng.random() < 0.5:
                await self._load(name, (name, 1 - now[1]), "reload", load_inplace=True)
            else:
                await self._unload(name)
            await self._pause()

    async def _load(self, name: str, content: Content, what: str, **more: bool) -> None:
        body = {"lora_name": name, "lora_path": self._site.path(content)} | more
        began_s = time.monotonic()
        response = await self._http.post("/v1/load_lora_adapter", json=body)
        if self._is_well(response, what):
            self.timelines[name].change(content, began_s, time.monotonic())

    async def _unload(self, name: str) -> None:
        began_s = time.monotonic()
        if self._rng.random() < 0.5:
            response = await self._http.delete(f"/admin/adapters/{name}?force=true")
        else:
            response = await self._http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        if self._is_well(response, "unload"):
            self.timelines[name].change(None, began_s, time.monotonic())

    async def _calibrate(self, prompts: Sequence[str], references: References) -> None:
        """One job after the other; some are cancelled. Samples are what depth 2 says."""
        names = [name for name in self._site.names if name not in self._site.moving]
        while not self._is_over():
            name = self._rng.choice(names)
            texts = [references.get(((name, 0), 2, number)) for number in range(len(prompts))]
            known = [
                {"prompt": prompt, "completion": text[:LENGTH]}
                for prompt, text in zip(prompts, texts, strict=True)
                if text is not None
            ]
            samples = [known[number % len(known)] for number in range(MIN_SAMPLES)]
            path = f"/admin/adapters/{name}/recalibrate"
            response = await self._http.post(path, json={"dataset": {"samples": samples}})
            if self._is_well(response, "recalibrate"):
                await self._follow(response.json()["job"]["id"])
            await self._pause()

    async def _follow(self, job: str) -> None:
        if self._rng.random() < 0.2:
            await asyncio.sleep(self._rng.uniform(0, JOB_POLL_S))
            await self._http.delete(f"/admin/jobs/{job}")
        while True:
            state = (await self._http.get(f"/admin/jobs/{job}")).json()["state"]
            if state in FINAL:
                self.done[f"job {state}"] += 1
                return
            await asyncio.sleep(JOB_POLL_S)

    async def _change_keys(self) -> None:
        """A new one in the place of the old, which is revoked while it is used."""
        while not self._is_over():
            await self._pause(4)
            listed = (await self._http.get("/admin/keys")).json()["keys"]
            changing = [each for each in listed if each["name"] == "changing"]
            await self._make_key("changing", {401})
            for each in changing:
                if each["revoked_at"] is None:
                    response = await self._http.delete(f"/admin/keys/{each['id']}")
                    self._is_well(response, "revoke")

    async def _make_key(
        self, name: str, refusals: Sequence[int] | set[int] = (), **limits: object
    ) -> None:
        response = await self._http.post("/admin/keys", json={"name": name} | limits)
        if self._is_well(response, "key"):
            self._keys[name] = Access(response.json()["key"], frozenset(refusals))

    def _is_well(self, response: httpx.Response, what: str) -> bool:
        self.done[what] += 1
        if response.is_success:
            return True
        self.problems.append(f"{what}: {response.status_code} {response.text[:300]}")
        return False

    async def _pause(self, times: float = 1) -> None:
        await asyncio.sleep(times * self._rng.uniform(0.5, 1.5) * self._pause_s)
