"""Usage in SQLite and PostgreSQL: added up by many, summed by time, key and model."""

import asyncio
from dataclasses import replace

import pytest

from boundary.store.store import Store, StoreError
from server.access.counts import Account, Counts
from server.access.key_store import KeyStore
from server.access.usage_store import BATCH, Filter, UsageStore

pytestmark = pytest.mark.anyio

DAY = 24 * 20_000
"""The first hour of some day."""
SQL = Account(DAY, "ada", "base", "sql", 6)
ONE = Counts(1, 10, 4, 20, 0, 0, 0)
CUT = Counts(1, 5, 0, 3, 1, 5, 3)


@pytest.fixture
async def usage(store: Store) -> UsageStore:
    await KeyStore.open(store.database)
    return UsageStore(store.database)


async def test_what_is_added_again_is_added_up(usage: UsageStore) -> None:
    base = replace(SQL, adapter=None, depth=0)
    await usage.add({SQL: ONE, base: ONE})
    await usage.add({SQL: CUT, replace(SQL, hour=DAY + 1): ONE})
    assert await usage.sums(Filter(), "hour", 100) == [
        (replace(SQL, hour=DAY + 1), ONE),
        (base, ONE),
        (SQL, Counts(2, 15, 4, 23, 1, 5, 3)),
    ]
    assert await usage.total(Filter()) == ONE + ONE + ONE + CUT


async def test_hours_become_days_and_all_time(usage: UsageStore) -> None:
    for hour in (DAY - 1, DAY, DAY + 23, DAY + 24):
        await usage.add({replace(SQL, hour=hour): ONE})
    days = await usage.sums(Filter(), "day", 100)
    assert [(account.hour, counts.requests) for account, counts in days] == [
        (DAY + 24, 1),
        (DAY, 2),
        (DAY - 24, 1),
    ]
    ((account, counts),) = await usage.sums(Filter(), "all", 100)
    assert (account, counts.requests) == (replace(SQL, hour=0), 4)


async def test_each_part_of_a_filter_must_hold(usage: UsageStore) -> None:
    accounts = [
        SQL,
        replace(SQL, key="bob"),
        replace(SQL, adapter=None, depth=0),
        replace(SQL, base="other"),
        replace(SQL, depth=12),
        replace(SQL, hour=DAY + 5),
    ]
    await usage.add(dict.fromkeys(accounts, ONE))
    for filter, num in (
        (Filter(), 6),
        (Filter(key="bob"), 1),
        (Filter(key="nobody"), 0),
        (Filter(adapter=""), 1),
        (Filter(adapter="sql"), 5),
        (Filter(base="other"), 1),
        (Filter(since=DAY + 1), 1),
        (Filter(since=DAY, until=DAY + 5), 5),
        (Filter(until=DAY), 0),
        (Filter(key="ada", adapter="sql", base="base", since=DAY, until=DAY + 5), 2),
    ):
        assert len(await usage.sums(filter, "hour", 100)) == num, filter
        assert (await usage.total(filter)).requests == num


async def test_pages_have_every_row_once(usage: UsageStore) -> None:
    await usage.add({replace(SQL, depth=depth): ONE for depth in range(7)})
    pages = [await usage.sums(Filter(), "hour", 3, offset) for offset in (0, 3, 6)]
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [account.depth for page in pages for account, _ in page] == list(range(7))


async def test_more_rows_than_a_statement_takes(usage: UsageStore) -> None:
    many = {replace(SQL, key=f"key-{n}"): ONE for n in range(2 * BATCH + 1)}
    await usage.add(many)
    await usage.add(many)
    assert (await usage.total(Filter())).requests == 2 * len(many)
    assert len(await usage.sums(Filter(), "hour", 10_000)) == len(many)


async def test_many_servers_add_at_once_and_nothing_is_lost(
    usage: UsageStore, other: Store
) -> None:
    second = UsageStore(other.database)
    await asyncio.gather(*(each.add({SQL: ONE}) for _ in range(10) for each in (usage, second)))
    assert (await usage.total(Filter())).requests == 20


async def test_a_write_is_whole_or_not_at_all(usage: UsageStore) -> None:
    await usage.add({SQL: ONE})
    wrong = {replace(SQL, key=f"key-{n}"): ONE for n in range(BATCH)}
    with pytest.raises(StoreError):
        await usage.add(wrong | {replace(SQL, key="last"): replace(ONE, requests=2**70)})
    assert await usage.total(Filter()) == ONE
