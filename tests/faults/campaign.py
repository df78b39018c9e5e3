"""A server that is killed again and again in the midst of all that it writes, and what it left each time."""

import asyncio
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx

from server.access.counts import Counts
from tests import postgres
from tests.faults import nursed, stored
from tests.faults.clients import LIMIT_S, Clients, Seen, lost_after
from tests.faults.decisions import AS_ADMIN, Operator, samples, what_was_told_is_kept
from tests.faults.nursed import Nursed, Nursery
from tests.faults.stored import Stored
from tests.live.operator import NAME
from tests.live.process import ADMIN_KEY, LLAMA, Site, make_site, metric
from tests.parity.adapters import save_adapter

WRITTEN = "fathom_usage_written_requests_total"
NUM_CLIENTS = 3
LEASE_S = 10.0
"""Of a job; a server that starts takes no job for lost before."""


@dataclass(frozen=True, slots=True)
class Options:
    num_kills: int = 20
    database: str = "sqlite"
    seed: int = 0
    earliest_s: float = 0.2
    latest_s: float = 6.0
    """When after a server's first answers it is killed."""
    faults: tuple[str, ...] = ()
    """What is broken in the servers on purpose."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill and what was lost with it."""

    at_s: float
    num_answered: int
    num_in_flight: int
    num_acknowledged: int
    """Requests of which the metrics said that their usage was written."""
    num_written: int
    lost_s: float
    """How old the oldest answer was whose usage is not there."""
    stalled_s: float
    """The longest that the server took for its metrics: on a machine that is short of time, seconds."""
    unfinished: tuple[str, ...]
    """States of jobs that it left."""


@dataclass(slots=True)
class Outcome:
    kills: list[Kill] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    left: Stored | None = None
    """What the store holds at the end."""

    @property
    def is_well(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True)
class Access:
    """A key in the database."""

    id: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}


class Scraper:
    """Reads, until it is over, how much usage the server says it has written."""

    def __init__(self, url: str) -> None:
        self.num_written = 0
        """Since the scraper was made."""
        self.stalled_s = 0.0
        """The longest that it waited for an answer."""
        self._url = url
        self._num_before = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "Scraper":
        with httpx.Client(base_url=self._url, timeout=LIMIT_S) as http:
            self._num_before = int(metric(http, WRITTEN))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LIMIT_S)

    def _work(self) -> None:
        with httpx.Client(base_url=self._url, timeout=LIMIT_S) as http:
            while not self._over.wait(0.1):
                asked_s = time.monotonic()
                try:
                    self.num_written = int(metric(http, WRITTEN)) - self._num_before
                except httpx.TransportError:
                    return
                finally:
                    self.stalled_s = max(self.stalled_s, time.monotonic() - asked_s)


def run(options: Options, folder: Path) -> Outcome:
    """Kill as often as asked; folder: for model, adapters, logs and SQLite's file."""
    with ExitStack() as stack:
        url = f"sqlite:///{folder / 'fathom.db'}"
        if options.database == "postgresql":
            url = stack.enter_context(postgres.running()).fresh_url()
        nursery = stack.enter_context(nursed.opened(*options.faults))
        campaign = _Campaign(options, folder, url, nursery)
        for number in range(options.num_kills):
            campaign.kill(number)
        campaign.settle()
    return campaign.outcome


class _Campaign:
    def __init__(self, options: Options, folder: Path, url: str, nursery: Nursery) -> None:
        self.outcome = Outcome()
        self._options = options
        self._folder = folder
        self._url = url
        self._nursery = nursery
        self._rng = random.Random(options.seed)
        self._site = make_site(folder)
        self._names = _fresh_adapters(self._site)
        self._keys: dict[str, Access] = {}
        """The `client`'s, whose usage is checked, and the `other`'s, for what must be asked beside."""
        self._samples: list[dict[str, str]] = []
        self._adapter = ""
        """The content that is decided about."""

    def kill(self, number: int) -> None:
        """Start a server, let everything happen, kill it, and look."""
        server = self._serve(f"server-{number}")
        if not self._keys:
            self._prepare(server)
        before = self._look_before(server, number)
        moment_s = self._rng.uniform(self._options.earliest_s, self._options.latest_s)
        seed = f"{self._options.seed}/{number}"
        clients = Clients(server.url, self._keys["client"].key, NUM_CLIENTS, seed)
        operator = Operator(server.url, self._names, self._samples, seed)
        scraper = Scraper(server.url)
        with scraper, clients, operator:
            clients.until_answered(1)
            time.sleep(moment_s)
            self._nursery.kill(server)
            died_s = time.monotonic()
        after = self._read()
        self._find(
            number,
            (each for each in clients.seen.problems if not each.startswith("no answer")),
            operator.told.problems,
            stored.history_is_whole(after),
            stored.jobs_are_whole(after),
            stored.usage_is_whole(after),
            stored.nothing_is_gone(before, after),
            what_was_told_is_kept(operator.told, before, after, self._adapter),
            usage_is_right(clients.seen, before, after, scraper.num_written),
        )
        states = tuple(job.state for job in after.jobs if job.state not in stored.FINAL)
        kill = _figures(moment_s, clients.seen, before, after, scraper, died_s, states)
        self.outcome.kills.append(kill)
        sys.stderr.write(f"{number + 1}: {kill}\n")

    def settle(self) -> None:
        """Start once more, until nothing is left of the killed servers but what they finished."""
        server = self._serve("last")
        before = self._look_before(server, self._options.num_kills)
        with httpx.Client(base_url=server.url, headers=AS_ADMIN, timeout=LIMIT_S) as http:
            give_up_at = time.monotonic() + LEASE_S + LIMIT_S
            while any(
                job["state"] not in stored.FINAL for job in http.get("/admin/jobs").json()["jobs"]
            ):
                if time.monotonic() > give_up_at:
                    break
                time.sleep(0.5)
        status = self._nursery.stop(server)
        left = self.outcome.left = self._read()
        self._find(
            self._options.num_kills,
            [] if status == 0 else [f"the last server ended with status {status}"],
            stored.history_is_whole(left),
            stored.jobs_are_whole(left, is_settled=True),
            stored.nothing_is_gone(before, left),
        )

    def _serve(self, name: str) -> Nursed:
        arguments = {
            "--admin-key": ADMIN_KEY,
            "--database": self._url,
            "--adapter-root": self._site.root,
            "--calibration-share": 0.5,  # so that jobs end beside the clients
        }
        words = [str(word) for item in arguments.items() for word in item]
        return self._nursery.serve(self._site, self._folder / name, *words)

    def _prepare(self, server: Nursed) -> None:
        """What the campaign needs of its first server: keys, samples, and what the store calls an adapter."""
        with httpx.Client(base_url=server.url, headers=AS_ADMIN, timeout=LIMIT_S) as http:
            for name in ("client", "other"):
                made = http.post("/admin/keys", json={"name": name}).json()
                self._keys[name] = Access(made["id"], made["key"])
            adapters = http.get("/admin/adapters").json()["adapters"]
            (self._adapter,) = (each["digest"] for each in adapters if each["name"] == NAME)
        headers = self._keys["other"].headers
        with httpx.Client(base_url=server.url, headers=headers, timeout=LIMIT_S) as http:
            self._samples = samples(http)

    def _look_before(self, server: Nursed, number: int) -> Stored:
        """A server that has just started says what the store says."""
        before = self._read()
        with httpx.Client(base_url=server.url, timeout=LIMIT_S) as http:
            self._find(number, self._shows(http, before))
        return before

    def _read(self) -> Stored:
        return asyncio.run(stored.read(self._url, self._keys["client"].id))

    def _shows(self, http: httpx.Client, kept: Stored) -> Iterator[str]:
        path = f"/admin/adapters/{NAME}/boundaries"
        history = http.get(path, headers=AS_ADMIN).json()["boundaries"]
        active = [each["version"] for each in history if each["is_active"]]
        decided = [each.version for each in kept.decisions if each.adapter == self._adapter]
        if active != decided[-1:]:
            yield f"the history shows {active} as active, and {decided[-1:]} was decided last"
        body = {"model": NAME, "prompt": "x", "max_tokens": 0, "echo": True}
        answer = http.post("/v1/completions", json=body, headers=self._keys["other"].headers)
        version = answer.json().get("lora", {}).get("boundary_version")
        if [version] != (decided[-1:] or [None]):
            yield f"a request runs with version {version}, and {decided[-1:]} is active"
        asked = {"bucket": "all", "key": self._keys["client"].id}
        # Asked last, because it is written before it is told: what comes after is the clients' alone.
        told = http.get("/admin/usage", params=asked, headers=AS_ADMIN).json()["total"]
        total = sum(kept.usage.values(), Counts())
        if (told["requests"], told["completion_tokens"]) != (
            total.requests,
            total.completion_tokens,
        ):
            yield f"/admin/usage says {told}, and the table {total}"

    def _find(self, number: int, *rules: Iterator[str] | list[str]) -> None:
        for rule in rules:
            self.outcome.findings += [f"kill {number + 1}: {finding}" for finding in rule]


def usage_is_right(seen: Seen, before: Stored, after: Stored, acknowledged: int) -> Iterator[str]:
    """No more than was asked, and no less than the metrics said was written."""
    gained = _gained(before, after)
    for model, num in gained.items():
        if num > seen.started[model]:
            yield f"{model}: {num} requests in the store, and {seen.started[model]} were sent"
    if gained.total() < acknowledged:
        yield f"{gained.total()} requests in the store, and {acknowledged} were said to be there"


def _gained(before: Stored, after: Stored) -> Counter[tuple[str | None, int]]:
    return Counter(
        {
            model: counts.requests - before.usage.get(model, Counts()).requests
            for model, counts in after.usage.items()
        }
    )


def _figures(
    moment_s: float,
    seen: Seen,
    before: Stored,
    after: Stored,
    scraper: Scraper,
    died_s: float,
    unfinished: tuple[str, ...],
) -> Kill:
    gained = _gained(before, after)
    lost_s = max(
        (
            lost_after(times, max(0, len(times) - gained[model]), died_s)
            for model, times in seen.answered.items()
        ),
        default=0.0,
    )
    return Kill(
        at_s=round(moment_s, 3),
        num_answered=seen.num_answered,
        num_in_flight=seen.num_in_flight,
        num_acknowledged=scraper.num_written,
        num_written=gained.total(),
        lost_s=round(lost_s, 3),
        stalled_s=round(scraper.stalled_s, 3),
        unfinished=unfinished,
    )


def _fresh_adapters(site: Site) -> Iterator[str]:
    """Adapters below the root that nobody has seen, so that no job of a killed server is in the way."""
    for number in count():
        save_adapter(LLAMA, "plain", site.root / f"new-{number}", seed=100 + number)
        yield f"new-{number}"
