"""Usage on its way to the store: summed without waiting, written in the background, never lost."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from boundary.store.store import Store, StoreError
from server.access import ledger as ledger_module
from server.access.counts import Account, Counts
from server.access.key import NOBODY
from server.access.key_store import KeyStore
from server.access.ledger import Ledger
from server.access.usage_store import Batch, Filter, UsageStore
from server.engine.request import AdapterRef, LoraSelection

pytestmark = pytest.mark.anyio

ONE = Counts(1, 10, 4, 20, 0, 0, 0)
BASE = LoraSelection(None, 0, 12, "base")
SQL = LoraSelection(AdapterRef("sql", 1, "sha256:sql", 8, 10, 1, "/sql"), 12, 12, "full")
HOUR = 490_000


class Now:
    def __init__(self) -> None:
        self.hour = HOUR

    def __call__(self) -> datetime:
        return datetime.fromtimestamp(self.hour * 3600 + 1800, UTC)


class Kept:
    """A usage store that can be told to fail, or to wait."""

    def __init__(self) -> None:
        self.written: list[dict[Account, Counts]] = []
        self.is_failing = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def add(self, usage: dict[Account, Counts], batch: Batch) -> None:
        await self.gate.wait()
        if self.is_failing:
            raise StoreError("database: gone")
        self.written.append(dict(usage))

    def total(self) -> Counts:
        return sum((c for usage in self.written for c in usage.values()), Counts())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "FLUSH_S", 0.01)


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def ledger(kept: Any, now: Now) -> Ledger:
    made = Ledger("base", now)
    made.attach(kept)
    return made


async def test_usage_is_summed_by_hour_key_model_and_effective_depth(
    ledger: Ledger, kept: Kept, now: Now
) -> None:
    for _ in range(3):
        ledger.add(NOBODY, SQL, ONE)
    ledger.add(NOBODY, BASE, ONE)
    now.hour += 1
    ledger.add(NOBODY, BASE, ONE)
    await ledger.flush()
    assert kept.written == [
        {
            Account(HOUR, "none", "base", "sql", 10): ONE + ONE + ONE,
            Account(HOUR, "none", "base", None, 0): ONE,
            Account(HOUR + 1, "none", "base", None, 0): ONE,
        }
    ]
    await ledger.flush()
    assert len(kept.written) == 1, "nothing is written where nothing was used"


async def test_adding_waits_for_nobody(ledger: Ledger, kept: Kept) -> None:
    """`add` is no coroutine; and while a write waits, more is added and nothing is lost."""
    kept.gate.clear()
    ledger.add(NOBODY, BASE, ONE)
    writing = asyncio.create_task(ledger.flush())
    await asyncio.sleep(0)
    for _ in range(1000):
        ledger.add(NOBODY, BASE, ONE)
    assert not writing.done()
    kept.gate.set()
    await writing
    await ledger.flush()
    assert [usage.requests for each in kept.written for usage in each.values()] == [1, 1000]


async def test_what_could_not_be_written_is_written_later(ledger: Ledger, kept: Kept) -> None:
    kept.is_failing = True
    ledger.add(NOBODY, BASE, ONE)
    stop = asyncio.Event()
    with capture_logs() as logs:
        following = asyncio.create_task(ledger.follow(stop))
        while not logs:
            await asyncio.sleep(0.01)
        for _ in range(5):
            ledger.add(NOBODY, BASE, ONE)
            await asyncio.sleep(0.02)
        assert kept.written == []
        kept.is_failing = False
        while kept.total().requests < 6:
            await asyncio.sleep(0.01)
        stop.set()
        await following
    assert kept.total() == Counts(*(6 * n for n in (1, 10, 4, 20, 0, 0, 0)))
    assert [log["log_level"] for log in logs] == ["warning", "info"]


async def test_a_write_that_is_cancelled_is_made_again(ledger: Ledger, kept: Kept) -> None:
    kept.gate.clear()
    ledger.add(NOBODY, BASE, ONE)
    writing = asyncio.create_task(ledger.flush())
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    kept.gate.set()
    await ledger.close()
    assert kept.total() == ONE


async def test_a_stop_tries_again_and_says_what_it_lost(ledger: Ledger, kept: Kept) -> None:
    kept.is_failing = True
    ledger.add(NOBODY, BASE, ONE)
    with capture_logs() as logs:
        await ledger.close()
    assert [log["log_level"] for log in logs] == ["warning"] * ledger_module.LAST_TRIES + ["error"]
    assert (logs[-1]["requests"], logs[-1]["completion_tokens"]) == (1, 20)
    kept.is_failing = False
    with capture_logs() as logs:
        await ledger.close()
    assert (logs, kept.total()) == ([], ONE)


async def test_without_a_store_nothing_is_kept() -> None:
    ledger = Ledger("base")
    ledger.add(NOBODY, BASE, ONE)
    await ledger.close()
    assert ledger._unwritten == {}


async def test_ten_thousand_requests_take_the_memory_of_their_accounts(
    ledger: Ledger, kept: Kept
) -> None:
    kept.is_failing = True
    for number in range(10_000):
        ledger.add(NOBODY, SQL if number % 2 else BASE, ONE)
    assert len(ledger._unwritten) == 2


async def test_it_arrives_in_a_database(store: Store) -> None:
    await KeyStore.open(store.database)
    usage = UsageStore(store.database)
    ledger = Ledger("base")
    ledger.attach(usage)
    stop = asyncio.Event()
    following = asyncio.create_task(ledger.follow(stop))
    for _ in range(50):
        ledger.add(NOBODY, SQL, ONE)
        await asyncio.sleep(0.001)
    stop.set()
    await following
    await ledger.close()
    assert (await usage.total(Filter(adapter="sql"))).requests == 50


class Unheard(UsageStore):
    """Commits, and is gone before it can say so."""

    num_unheard = 1

    async def add(self, usage: Any, batch: Batch | None = None) -> None:
        await super().add(usage, batch)
        if self.num_unheard:
            self.num_unheard -= 1
            raise StoreError("database: server closed the connection unexpectedly")


async def test_a_commit_that_nobody_heard_of_counts_once(store: Store) -> None:
    await KeyStore.open(store.database)
    usage = Unheard(store.database)
    ledger = Ledger("base")
    ledger.attach(usage)
    ledger.add(NOBODY, SQL, ONE)
    with pytest.raises(StoreError):
        await ledger.flush()
    ledger.add(NOBODY, SQL, ONE)
    assert (ledger.num_written, ledger.num_unwritten) == (0, 2)
    await ledger.flush()
    assert await usage.total(Filter()) == ONE + ONE
    assert (ledger.num_written, ledger.num_unwritten) == (2, 0)
    ledger.add(NOBODY, SQL, ONE)
    await ledger.close()
    assert await usage.total(Filter()) == ONE + ONE + ONE


async def test_without_its_number_such_a_write_would_count_twice(store: Store) -> None:
    """The control of the test above."""
    await KeyStore.open(store.database)
    usage = Unheard(store.database)
    account = Account(HOUR, "none", "base", "sql", 10)
    with pytest.raises(StoreError):
        await usage.add({account: ONE})
    await usage.add({account: ONE})
    assert await usage.total(Filter()) == ONE + ONE
