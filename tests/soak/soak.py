"""One soak from its model to its findings."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.soak import check
from tests.soak.client import Client
from tests.soak.operator import Operator
from tests.soak.record import Record, References
from tests.soak.references import draw_prompts, find_references
from tests.soak.served import (
    ADMIN_KEY,
    API_KEY,
    Metrics,
    SoakServer,
    read_log,
    scrape,
    served,
    total,
)
from tests.soak.site import SoakSite, make_site
from tests.soak.traffic import MAX_TOKENS, Keys, ask_all

SAMPLE_S = 0.25
QUIET_S = 30.0
"""How long a server may take to be quiet once nobody asks."""
GRACE_S = 60.0
"""How long a soak may last past its time."""


@dataclass(frozen=True, slots=True)
class Options:
    duration_s: float = 600.0
    until_done: frozenset[str] = frozenset()
    """It lasts longer, by `GRACE_S` at most, until the operator has done each of these."""
    num_clients: int = 200
    seed: int = 0
    num_adapters: int = 96
    num_moving: int = 16
    num_slots: int = 8
    num_in_memory: int = 64
    num_prompts: int = 6
    warm_share: float = 0.2
    """Of the duration; memory is compared from there on. By then every kind of request came often."""
    change_pause_s: float = 1.0
    """Between two changes of an operator."""
    model: Path | None = None
    """A directory to work in that is kept; else a temporary one."""


@dataclass(slots=True)
class Outcome:
    """What was seen, and what was wrong."""

    options: Options
    records: list[Record] = field(default_factory=list)
    num_compared: int = 0
    num_references: int = 0
    done: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    growth: check.Growth | None = None
    metrics: Metrics = field(default_factory=dict)
    num_logged: int = 0
    elapsed_s: float = 0.0
    findings: dict[str, list[str]] = field(default_factory=dict)
    """By rule; a rule without findings held."""

    @property
    def is_well(self) -> bool:
        return not any(self.findings.values())


def arguments(site: SoakSite, directory: Path, options: Options) -> dict[str, object]:
    """Few blocks and slots, a short queue: what can run out does."""
    return {
        "--adapter-root": site.root,
        "--database": f"sqlite:///{directory / 'soak.db'}",
        "--api-key": API_KEY,
        "--admin-key": ADMIN_KEY,
        "--device": "cpu",
        "--dtype": "float32",
        "--kv-cache-bytes": "1MiB",
        "--block-size": 4,
        "--max-loras": options.num_slots,
        "--max-cpu-loras": options.num_in_memory,
        "--max-num-seqs": 48,
        "--max-num-batched-tokens": 128,
        "--max-num-waiting": max(8, options.num_clients * 3 // 4),
        "--queue-timeout-s": 20,
        "--request-timeout-s": 60,
        "--log-level": "info",
        "--log-format": "json",
    }


@contextmanager
def workplace(options: Options) -> Iterator[Path]:
    if options.model is not None:
        options.model.mkdir(parents=True)
        yield options.model
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        yield Path(name)


def soak(options: Options) -> Outcome:
    """Make everything, run, stop, and check."""
    with workplace(options) as directory:
        site = make_site(
            directory,
            num_adapters=options.num_adapters,
            num_moving=options.num_moving,
            seed=options.seed,
        )
        log = directory / "server.log"
        with served(site.model, log, arguments(site, directory, options)) as server:
            outcome, after = asyncio.run(_run(server, site, options))
            status = server.stop()
        lines, others = read_log(log)
        _judge(outcome, after, lines, others)
        outcome.findings["stop"] = [] if status == 0 else [f"the server ended with status {status}"]
        return outcome


@dataclass(slots=True)
class _After:
    """What the rules need besides the records."""

    references: References
    operator: Operator
    before: Metrics
    usage: dict[str, Any]


async def _run(server: SoakServer, site: SoakSite, options: Options) -> tuple[Outcome, _After]:
    outcome = Outcome(options)
    keys: Keys = {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.num_clients)
    as_admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    as_client = {"authorization": f"Bearer {API_KEY}"}
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http,
        httpx.AsyncClient(base_url=server.url, timeout=120, headers=as_admin) as admin,
        httpx.AsyncClient(base_url=server.url, timeout=120, headers=as_client) as asker,
    ):
        prompts = draw_prompts(options.num_prompts, options.seed)
        references = await find_references(asker, admin, site, prompts, MAX_TOKENS)
        outcome.num_references = len(references)
        used_before = await _usage(admin)
        before = await scrape(http)
        began_s = time.monotonic()
        over_s = began_s + options.duration_s

        def is_over() -> bool:
            late_s = time.monotonic() - over_s
            has_done_all = options.until_done <= operator.done.keys()
            return server.process.poll() is not None or late_s >= (0 if has_done_all else GRACE_S)

        operator = Operator(
            admin, site, keys, pause_s=options.change_pause_s, seed=options.seed, is_over=is_over
        )
        await operator.make_keys()
        watching = asyncio.create_task(_watch(server, outcome, began_s))
        async with asyncio.TaskGroup() as group:
            group.create_task(operator.work(prompts, references))
            group.create_task(
                ask_all(
                    Client(http, prompts),
                    site,
                    keys,
                    prompts,
                    num_clients=options.num_clients,
                    seed=options.seed,
                    is_over=is_over,
                    take=outcome.records.append,
                )
            )
        outcome.elapsed_s = time.monotonic() - began_s
        outcome.metrics = await _quiet(http)
        watching.cancel()
        used = await _usage(admin)
        outcome.done = dict(operator.done)
        outcome.findings["operator"] = operator.problems
        outcome.findings["slots"] = await _unload_all(http, admin, operator)
        usage = {name: used[name] - used_before[name] for name in ("requests", "completion_tokens")}
        return outcome, _After(references, operator, before, usage)


async def _watch(server: SoakServer, outcome: Outcome, began_s: float) -> None:
    while True:
        outcome.memory.append((time.monotonic() - began_s, server.rss_bytes()))
        await asyncio.sleep(SAMPLE_S)


async def _usage(admin: httpx.AsyncClient) -> dict[str, int]:
    response = await admin.get("/admin/usage", params={"bucket": "all"})
    response.raise_for_status()
    total: dict[str, int] = response.json()["total"]
    return total


async def _quiet(http: httpx.AsyncClient) -> Metrics:
    """Its metrics once nothing runs any more, or when that has lasted too long."""
    give_up_s = time.monotonic() + QUIET_S
    while True:
        metrics = await scrape(http)
        if not list(check.all_is_back(metrics)) or time.monotonic() > give_up_s:
            return metrics
        await asyncio.sleep(SAMPLE_S)


async def _unload_all(
    http: httpx.AsyncClient, admin: httpx.AsyncClient, operator: Operator
) -> list[str]:
    """Without adapters nothing of one may be left on the device. The unload waits for their requests."""
    names = [each["name"] for each in (await admin.get("/admin/adapters")).json()["adapters"]]
    for name in names:
        (await admin.delete(f"/admin/adapters/{name}")).raise_for_status()
    give_up_s = time.monotonic() + QUIET_S
    while True:
        metrics = await scrape(http)
        left = sum(v for labels, v in metrics["fathom_adapters"] if labels["place"] == "device")
        if not left and not total(metrics, "fathom_lora_bytes"):
            return []
        if time.monotonic() > give_up_s:
            return [f"{left:.0f} adapters are on the device when all were unloaded"]
        await asyncio.sleep(SAMPLE_S)


def _judge(outcome: Outcome, after: _After, lines: list[dict[str, Any]], others: list[str]) -> None:
    records = outcome.records
    found = outcome.findings
    outcome.num_logged = sum(line.get("message") == "request" for line in lines)
    found["ends"] = list(check.ended_once(records))
    found["statuses"] = list(check.answered_as_documented(records))
    outcome.num_compared, found["answers"] = check.answers_are_right(
        records, after.references, after.operator.timelines
    )
    found["access log"] = list(check.logged_once(records, lines))
    found["log"] = list(check.log_is_clean(lines, others))
    found["sums"] = list(
        check.metrics_add_up(records, lines, after.before, outcome.metrics, after.usage)
    )
    found["blocks"] = list(check.all_is_back(outcome.metrics))
    outcome.growth = check.growth_of(
        outcome.memory, outcome.options.duration_s * outcome.options.warm_share
    )
    found["memory"] = list(outcome.growth.findings())
