"""Keys in SQLite and PostgreSQL: made, revoked, found by another process, and audited without secrets."""

import asyncio
import re
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from structlog.testing import capture_logs

from boundary.store.store import Store, StoreError
from server.access import secret, tables
from server.access.hashed_key import NoSuchKey
from server.access.key import Grant, NewKey
from server.access.key_store import KeyStore
from tests.boundary.test_database import asking, definitions, execute

pytestmark = pytest.mark.anyio

GRANT = Grant(adapters=("sql*", "base"), max_depth=6, requests_per_minute=60)


@pytest.fixture
async def keys(store: Store) -> KeyStore:
    return await KeyStore.open(store.database)


async def test_a_key_is_made_and_found_by_another_process(keys: KeyStore, other: Store) -> None:
    made, key_text = await keys.create(NewKey(name="ada", grant=GRANT), "tester")
    assert secret.matches(key_text, made.hash)
    found, newest = await (await KeyStore.open(other.database)).changed_since(0)
    assert found == [made]
    assert (made.key.grant, made.key.source, newest) == (GRANT, "database", 1)


async def test_only_what_changed_is_told(keys: KeyStore) -> None:
    ada, _ = await keys.create(NewKey(name="ada"), "tester")
    bob, _ = await keys.create(NewKey(name="bob", scope="admin"), "tester")
    assert await keys.changed_since(2) == ([], 2)
    revoked = await keys.revoke(ada.key.id, "tester")
    assert await keys.changed_since(2) == ([revoked], 3)
    assert await keys.changed_since(0) == ([bob, revoked], 3)
    assert revoked.revoked_at is not None
    assert await keys.revoke(ada.key.id, "tester") == revoked
    assert await keys.changed_since(3) == ([], 3)
    with pytest.raises(NoSuchKey):
        await keys.revoke("0" * 16, "tester")


async def test_what_is_done_is_in_the_audit_trail_without_secrets(
    keys: KeyStore, store: Store, store_url: str
) -> None:
    made, key_text = await keys.create(NewKey(name="ada", grant=GRANT), "tester")
    await keys.revoke(made.key.id, "tester")
    revoke, create = await store.audit()
    assert (create.action, create.subject) == ("key.create", f"key:{made.key.id}")
    assert create.details == {
        "name": "ada", "scope": "api", "adapters": ["sql*", "base"], "max_depth": 6,
        "requests_per_minute": 60,
    }  # fmt: skip
    assert (revoke.action, revoke.actor) == ("key.revoke", "tester")
    rows = asking(store_url, everything)
    assert made.key.id in rows
    assert key_text.split("-", 2)[2] not in rows
    assert made.hash in rows  # the control: what is kept is seen


def everything(connection: Connection) -> str:
    """All that the tables hold."""
    names = ("api_keys", "audit")
    return str([connection.execute(text(f"SELECT * FROM {name}")).all() for name in names])


async def test_many_at_once_get_numbers_of_their_own(keys: KeyStore, other: Store) -> None:
    second = await KeyStore.open(other.database)
    await asyncio.gather(
        *(each.create(NewKey(name=f"{n}"), "x") for n in range(3) for each in (keys, second))
    )
    found, newest = await keys.changed_since(0)
    assert (len({each.key.id for each in found}), newest) == (6, 6)


@pytest.mark.parametrize(
    "change",
    [
        """UPDATE api_keys SET limits = '{"max_depth": 6, "countries": ["NL"]}'""",
        "UPDATE api_keys SET hash = '$scrypt$ln=20,r=8,p=1$abc$def'",
    ],
)
async def test_a_key_that_a_newer_version_made_opens_nothing(
    keys: KeyStore, store_url: str, change: str
) -> None:
    await keys.create(NewKey(name="ada", grant=GRANT), "tester")
    execute(store_url, change)
    await keys.create(NewKey(name="bob"), "tester")
    with capture_logs() as logs:
        (ada, bob), _ = await keys.changed_since(0)
    assert ada.revoked_at is not None
    assert bob.revoked_at is None
    assert [log["key"] for log in logs] == [ada.key.id]


# Migrations


def differences(connection: Connection) -> Any:
    """What alembic would put in a new revision of these tables."""
    ours = tables.Base.metadata.tables

    def is_ours(item: Any, name: str | None, kind: str, *_: Any) -> bool:
        return (name if kind == "table" else item.table.name) in ours

    options = {"version_table": tables.VERSION_TABLE, "include_object": is_ours}
    context = MigrationContext.configure(connection, opts=options)
    return compare_metadata(context, tables.Base.metadata)


def own_definitions(connection: Connection) -> set[str]:
    """What the database says of these tables."""
    found = definitions(connection)
    return {each for each in found if re.search(r"\b(api_keys|usage)\b", each)}


async def test_migrations_make_the_tables_of_the_models(
    keys: KeyStore, store_url: str, second_url: str
) -> None:
    asking(second_url, tables.Base.metadata.create_all)
    assert asking(store_url, differences) == []
    made = asking(store_url, own_definitions)
    assert made == asking(second_url, own_definitions)
    assert len(made) >= 3


@pytest.mark.parametrize(
    "change",
    ["DROP INDEX uq_api_keys_sequence", "ALTER TABLE usage ADD COLUMN cost INTEGER"],
)
async def test_tables_that_differ_are_found(keys: KeyStore, store_url: str, change: str) -> None:
    execute(store_url, change)
    assert asking(store_url, differences) != []


async def test_a_library_that_knows_no_keys_opens_the_database_still(
    keys: KeyStore, store_url: str
) -> None:
    await keys.create(NewKey(name="ada"), "tester")
    again = await Store.open(store_url)
    assert len(await again.audit()) == 1
    assert len((await (await KeyStore.open(again.database)).changed_since(0))[0]) == 1
    await again.close()


async def test_tables_of_a_newer_version_are_refused_untouched(
    keys: KeyStore, store: Store, store_url: str
) -> None:
    execute(store_url, f"UPDATE {tables.VERSION_TABLE} SET version_num = '9999'")
    before = asking(store_url, definitions)
    with pytest.raises(StoreError, match=r"revision '9999'.*newest is '0002'"):
        await KeyStore.open(store.database)
    assert asking(store_url, definitions) == before


async def test_many_may_open_a_new_database_at_once(store_url: str) -> None:
    async def opened() -> None:
        store = await Store.open(store_url)
        await KeyStore.open(store.database)
        await store.close()

    await asyncio.gather(*(opened() for _ in range(4)))
    assert asking(store_url, differences) == []
