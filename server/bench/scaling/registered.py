"""What registered adapters cost of which few are used: start-up, memory, looking one up.

Two ways to register: directories below `--adapter-root`, which nobody looks at before they are asked
for, and names in a TOML file, whose headers are proved at the start. Every way and number is measured
in a process of its own. The adapters are links to one checkpoint: what is measured is what each costs
the server, not the disk.
"""

import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest.mock import patch

import httpx2
import psutil
from rich.table import Table

from server.access.key import NOBODY
from server.api.app import create_app
from server.api.selection import select
from server.bench.measure import Spread
from server.engine.async_engine import AsyncEngine
from server.environment import load_settings
from server.errors import NotFound
from server.logs import configure_logs
from server.model.tensor_file import open_regular

Way = Literal["root", "named"]
WAYS: tuple[Way, ...] = ("root", "named")
_MAX_CPU_LORAS = 16
"""Far fewer than are registered, so that what is measured is registering and not reading."""
_NUM_LOOK_UPS = 200
_NUM_LISTINGS = 5


@dataclass(frozen=True, slots=True)
class Registered:
    """One start with so many adapters; look-ups are medians of many.

    start_s: settings to an engine, the model's own load included. num_files: of adapters, opened by
        then. rss_bytes: then. hot_s: a loaded adapter selected by name. cold_s: one that was never asked
        for, so read. unknown_s: a name that nobody has. card_s: one model card over HTTP. list_s: all.
    """

    start_s: float
    num_files: int
    rss_bytes: int
    hot_s: float
    cold_s: float
    unknown_s: float
    card_s: float
    list_s: float
    num_listed: int


@dataclass(frozen=True, slots=True)
class RegisteredCost:
    """All starts of one way and number."""

    way: Way
    num_adapters: int
    runs: tuple[Registered, ...]

    def spread(self, field: str) -> Spread:
        """Of one of `Registered`'s fields."""
        return Spread.of([getattr(run, field) for run in self.runs])


def link_adapters(source: Path, root: Path, num_adapters: int) -> None:
    """So many directories below `root`, each with hard links to the files of `source`."""
    for index in range(num_adapters):
        directory = root / f"adapter-{index:05}"
        directory.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(source / file, directory / file)


def write_config(model: Path, way: Way, root: Path, num_adapters: int, path: Path) -> None:
    """Settings that register the adapters below `root` one way."""
    lines = [
        f"model = {json.dumps(str(model))}",
        'device = "cpu"',
        f"max_cpu_loras = {_MAX_CPU_LORAS}",
        'kv_cache_bytes = "1MiB"',
    ]
    if way == "root":
        lines.append(f"adapter_root = {json.dumps(str(root))}")
    else:
        lines.append("[adapter]")
        names = sorted(entry.name for entry in root.iterdir())[:num_adapters]
        lines += [f"{name} = {json.dumps(str(root / name))}" for name in names]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure_registered(
    model: Path,
    adapter: Path,
    counts: tuple[int, ...],
    repeat: int,
    directory: Path,
    progress: Callable[[str, int, int], None],
) -> list[RegisteredCost]:
    """Every way with every number, in turn, `repeat` times."""
    configs: dict[tuple[Way, int], Path] = {}
    for way, number in product(WAYS, counts):
        root = directory / f"root-{number}"
        if not root.exists():
            link_adapters(adapter, root, number)
        configs[way, number] = directory / f"{way}-{number}.toml"
        write_config(model, way, root, number, configs[way, number])
    found: dict[tuple[Way, int], list[Registered]] = {key: [] for key in configs}
    order = [(key, config) for _ in range(repeat) for key, config in configs.items()]
    for done, (key, config) in enumerate(order):
        progress("starts", done, len(order))
        # A process of its own: memory that a former start left would be counted again.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[key].append(pool.submit(measure_start, config).result())
    progress("starts", len(order), len(order))
    return [RegisteredCost(way, number, tuple(runs)) for (way, number), runs in found.items()]


def measure_start(config: Path) -> Registered:
    """Start an engine in this process, and look adapters up."""
    configure_logs("warning")
    began = time.perf_counter()
    with files_opened() as opened:
        settings = load_settings(config_file=config, environ={})
        engine = AsyncEngine.from_settings(settings, lambda *_: None)
        start_s = time.perf_counter() - began
        num_files = sum("adapter-" in path.parent.name for path in opened)
    try:
        rss_bytes = psutil.Process().memory_info().rss
        app = create_app(settings, engine)
        if settings.adapter_root is not None:
            names = sorted(entry.name for entry in settings.adapter_root.iterdir())
        else:
            names = list(settings.adapter)
        return asyncio.run(_look_up(engine, app, names, (start_s, num_files, rss_bytes)))
    finally:
        engine.shutdown()


async def _look_up(
    engine: AsyncEngine,
    app: Any,
    names: list[str],
    started: tuple[float, int, int],
) -> Registered:
    async def refuse() -> None:
        try:
            await select(engine, "nobody@2", None, NOBODY.grant)
        except NotFound:
            return
        raise RuntimeError("a name that nobody has was found")

    # The last are those that a start does not read, unless there are few.
    cold = iter(reversed(names))
    num_cold = min(len(names), _MAX_CPU_LORAS)
    cold_s = await _median_s(lambda: select(engine, next(cold), None, NOBODY.grant), num_cold)
    hot = names[-num_cold]
    hot_s = await _median_s(lambda: select(engine, hot, 1, NOBODY.grant), _NUM_LOOK_UPS)
    unknown_s = await _median_s(refuse, _NUM_LOOK_UPS)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://fathom") as client:

        async def get(path: str) -> httpx2.Response:
            return (await client.get(path)).raise_for_status()

        card_s = await _median_s(lambda: get(f"/v1/models/{hot}"), _NUM_LOOK_UPS)
        list_s = await _median_s(lambda: get("/v1/models"), _NUM_LISTINGS)
        num_listed = len((await get("/v1/models")).json()["data"]) - 1
    return Registered(*started, hot_s, cold_s, unknown_s, card_s, list_s, num_listed)


async def _median_s(ask: Callable[[], Awaitable[object]], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        await ask()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


@contextmanager
def files_opened() -> Iterator[list[Path]]:
    """Every file of an adapter that is opened while the block lasts, in order."""
    opened: list[Path] = []

    def note(path: Path, root: Path | None = None) -> object:
        opened.append(path)
        return open_regular(path, root)

    with (
        patch("server.model.tensor_file.open_regular", note),
        patch("server.model.adapter_config.open_regular", note),
        patch("server.model.outline.open_regular", note),
    ):
        yield opened


def registered_tables(found: list[RegisteredCost]) -> list[Table]:
    """What a start costs, then what look-ups do; one row a way and number."""
    starts = Table(caption="medians of the starts")
    for title in ("way", "adapters", "start, s", "files opened", "memory, MB", "listed"):
        starts.add_column(title, justify="right")
    look_ups = Table(caption="medians of many")
    for title in ("way", "adapters", "hot, us", "unknown, us", "cold, ms", "card, ms", "list, ms"):
        look_ups.add_column(title, justify="right")
    for one in found:
        starts.add_row(
            one.way,
            str(one.num_adapters),
            f"{one.spread('start_s').median:.2f}",
            f"{one.spread('num_files').median:.0f}",
            f"{one.spread('rss_bytes').median / 1e6:.0f}",
            f"{one.spread('num_listed').median:.0f}",
        )
        look_ups.add_row(
            one.way,
            str(one.num_adapters),
            *(f"{one.spread(name).median * 1e6:.0f}" for name in ("hot_s", "unknown_s")),
            *(f"{one.spread(name).median * 1e3:.2f}" for name in ("cold_s", "card_s", "list_s")),
        )
    return [starts, look_ups]
