"""From start to stop: what a stop waits for, and whether a server with such settings asks for keys."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from boundary.store.store import Store
from server.access import key_file, service
from server.access.counts import Counts
from server.access.key import NOBODY, NewKey
from server.access.key_store import KeyStore
from server.access.service import Access, needs_key
from server.access.usage_store import Filter, UsageStore
from server.config import Settings
from server.engine.request import LoraSelection
from server.errors import StoreUnavailable

pytestmark = pytest.mark.anyio

BASE = LoraSelection(None, 0, 12, "base")


async def stopped_with(
    store: Store, late: Callable[[Access], Awaitable[None]]
) -> tuple[Access, Counts]:
    """A server that stops while a request is not counted yet, and the usage that is then kept."""
    access = Access(Settings(), "base")
    async with access.running(store.database):
        access.ledger.num_open += 1
        ending = asyncio.create_task(late(access))
    kept = await UsageStore(store.database).total(Filter())
    ending.cancel()
    return access, kept


async def test_a_stop_waits_for_requests_that_are_not_counted_yet(store: Store) -> None:
    async def late(access: Access) -> None:
        await asyncio.sleep(0.3)
        access.ledger.add(NOBODY, BASE, Counts(requests=1))
        access.ledger.num_open -= 1

    _, kept = await stopped_with(store, late)
    assert kept.requests == 1


async def test_a_stop_does_not_wait_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control too: what is counted after the last write is not kept."""
    monkeypatch.setattr(service, "LAST_END_S", 0.05)

    async def never(_: Access) -> None:
        await asyncio.Event().wait()

    access, kept = await stopped_with(store, never)
    assert (access.ledger.num_open, kept.requests) == (1, 0)


async def test_keys_and_usage_are_there_while_it_runs_and_not_after(store: Store) -> None:
    access = Access(Settings(), "base")
    async with access.running(store.database):
        _, text = await access.key_store.create(NewKey(name="ada"), "tester")
        await access.keyring.refresh()
        assert await access.keyring.identify(text, "api") is not None
        assert (await access.usage_store.total(Filter())).requests == 0
    for part in ("key_store", "usage_store"):
        with pytest.raises(StoreUnavailable, match="--database"):
            getattr(access, part)


async def test_a_server_asks_for_keys_where_one_was_ever_made(store: Store, tmp_path: Path) -> None:
    assert not await needs_key(Settings(), None)
    assert not await needs_key(Settings(admin_key="root"), store.database)
    assert await needs_key(Settings(api_key="ada"), None)
    key_file.add(tmp_path / "keys.json", NewKey(name="ada"))
    assert await needs_key(Settings(keys_file=tmp_path / "keys.json"), None)
    keys = await KeyStore.open(store.database)
    await keys.create(NewKey(name="root", scope="admin"), "tester")
    assert not await needs_key(Settings(), store.database)
    made, _ = await keys.create(NewKey(name="ada"), "tester")
    await keys.revoke(made.key.id, "tester")
    assert await needs_key(Settings(), store.database)
