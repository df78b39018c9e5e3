"""Opening: URLs, migrations, many at once, and failures in one line without a password."""

import asyncio
import re
import socket
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, text

from boundary.store import database, history, tables
from boundary.store.store import Store, StoreError
from tests.boundary.test_store import KEY, pin
from tests.postgres import Postgres

pytestmark = pytest.mark.anyio

OPENER = Path(__file__).with_name("opener.py")


def asking(url: str, ask: Callable[[Connection], Any]) -> Any:
    """What a plain connection finds, past the store."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.begin() as connection:
            return ask(connection)
    finally:
        engine.dispose()


def execute(url: str, *statements: str) -> None:
    asking(url, lambda connection: [connection.execute(text(each)) for each in statements])


async def opened(url: str) -> None:
    await (await Store.open(url)).close()


async def refusal(url: str) -> str:
    """Why a store is not opened, in one line."""
    with pytest.raises(StoreError) as caught:
        await Store.open(url)
    message = str(caught.value)
    assert "\n" not in message
    everything = "".join(traceback.format_exception(caught.value))
    assert "S3CR" not in everything
    assert "3T" not in everything
    return message


DEFINITIONS = {
    "sqlite": ["SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'alembic_version'"],
    "postgresql": [
        "SELECT table_name, column_name, data_type, is_nullable, column_default "
        "FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name != 'alembic_version'",
        "SELECT indexdef FROM pg_indexes "
        "WHERE schemaname = 'public' AND tablename != 'alembic_version'",
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace "
        "AND conrelid::regclass::text != 'alembic_version'",
    ],
}


def definitions(connection: Connection) -> set[str]:
    """Everything that the database says about its tables, in its own words."""
    rows: Iterable[Any] = (
        row
        for query in DEFINITIONS[connection.dialect.name]
        for row in connection.execute(text(query))
    )
    return {" ".join(" | ".join(map(str, row)).split()) for row in rows}


def differences(connection: Connection) -> Any:
    """What alembic would put in a new revision."""
    return compare_metadata(MigrationContext.configure(connection), tables.Base.metadata)


async def test_migrations_make_the_tables_of_the_models(store_url: str, second_url: str) -> None:
    await opened(store_url)
    asking(second_url, tables.Base.metadata.create_all)
    assert asking(store_url, differences) == []
    made = asking(store_url, definitions)
    assert made == asking(second_url, definitions)
    assert len(made) >= 7


@pytest.mark.parametrize(
    "change",
    [
        "DROP INDEX uq_jobs_unfinished",
        "ALTER TABLE jobs ADD COLUMN priority INTEGER",
        "DROP TABLE audit",
    ],
)
async def test_tables_that_differ_are_found(store_url: str, second_url: str, change: str) -> None:
    await opened(store_url)
    asking(second_url, tables.Base.metadata.create_all)
    execute(store_url, change)
    assert asking(store_url, definitions) != asking(second_url, definitions)
    assert asking(store_url, differences) != []


async def test_opening_again_keeps_everything(store_url: str) -> None:
    first = await Store.open(store_url)
    kept, _ = await first.pin(pin(), actor="ada")
    await first.close()
    again = await Store.open(store_url)
    assert await again.active(KEY) == kept
    await again.close()


async def test_processes_may_open_a_new_database_at_once(
    tmp_path: Path, postgres: Postgres
) -> None:
    urls = [f"sqlite:///{tmp_path / f'{number}.db'}" for number in range(3)]
    servers = [postgres.fresh_url() for _ in range(3)]
    urls += servers
    command = [sys.executable, str(OPENER), *urls]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert (process.returncode, errors) == (0, "")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for url in urls:
        store = await Store.open(url)
        assert [entry.action for entry in await store.audit()] == ["open", "open"]
        await store.close()
    for url in servers:
        postgres.take_back(url)


async def test_a_new_database_waits_for_whoever_writes_in_it(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE another (id INTEGER)")
        other.execute("BEGIN IMMEDIATE")
        with (
            closing(sqlite3.connect(path, timeout=60)) as connection,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            connection.execute("PRAGMA journal_mode = WAL")  # SQLite itself does not wait here
        opening = asyncio.ensure_future(Store.open(f"sqlite:///{path}"))
        await asyncio.sleep(0.1)
        assert not opening.done()
        other.execute("ROLLBACK")
        store = await opening
    await store.add_audit(actor="a", action="b", subject="c")
    await store.close()


async def test_one_process_may_open_several_at_once(store_url: str, second_url: str) -> None:
    stores = await asyncio.gather(*map(Store.open, [store_url, second_url] * 4))
    kept, _ = await stores[0].pin(pin(), actor="ada")
    assert [await store.active(KEY) for store in stores] == [kept, None] * 4
    for store in stores:
        await store.close()


async def test_threads_with_loops_of_their_own_may_open_at_once(store_url: str) -> None:
    def run() -> None:
        asyncio.run(opened(store_url))

    await asyncio.gather(*(asyncio.to_thread(run) for _ in range(4)))
    assert asking(store_url, differences) == []


async def test_an_older_database_keeps_its_audit(store_url: str, second_url: str) -> None:
    """What the first revision's tables held is there after the second, in the tables of a new database."""
    from alembic import command
    from alembic.config import Config

    def first_revision(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "boundary.store:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text(
                "INSERT INTO audit (at, actor, action, subject, details)"
                " VALUES ('2026-01-02 03:04:05', 'ada', 'b', 'c', '{\"d\": 1}')"
            )
        )

    asking(store_url, first_revision)
    store = await Store.open(store_url)
    (entry,) = await store.audit()
    assert (entry.actor, entry.outcome, entry.request_id) == ("ada", "ok", None)
    assert entry.details == {"d": 1}
    assert (await store.add_audit(actor="a", action="b", subject="c")).id > entry.id
    await store.close()
    asking(second_url, tables.Base.metadata.create_all)
    assert asking(store_url, definitions) == asking(second_url, definitions)


async def test_a_database_of_a_newer_version_is_refused_untouched(store_url: str) -> None:
    await opened(store_url)
    newer = "UPDATE alembic_version SET version_num = '9999'", "DROP TABLE audit"
    execute(store_url, *newer)
    before = asking(store_url, definitions)
    message = await refusal(store_url)
    assert re.search(r"revision '9999'.*newest is '0002'.*upgrade Fathom", message)
    assert asking(store_url, definitions) == before


async def test_a_migration_that_fails_leaves_nothing_behind(store_url: str) -> None:
    execute(store_url, "CREATE TABLE audit (mine INTEGER)")
    before = asking(store_url, definitions)
    assert '"audit" already exists' in (await refusal(store_url)).replace("table audit", '"audit"')
    assert asking(store_url, definitions) == before
    execute(store_url, "DROP TABLE audit")
    await opened(store_url)
    assert asking(store_url, differences) == []


async def test_sqlite_is_set_up_for_many_processes_and_for_crashes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fathom.db'}"
    store = await Store.open(url)
    found = {}
    async with store._database.reading() as session:
        for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout"):
            found[name] = await session.scalar(text(f"PRAGMA {name}"))
    await store.close()
    assert found == {
        "journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "busy_timeout": 10_000,
    }  # fmt: skip


async def test_a_writer_waits_for_another_only_so_long(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE_S", 1)
    holder, waiting = await Store.open(store_url), await Store.open(store_url)
    async with holder._database.writing():
        with pytest.raises(StoreError, match="lock"):
            await waiting.pin(pin(), actor="ada")
        assert await waiting.history(KEY) == []  # readers never wait
    kept, _ = await waiting.pin(pin(), actor="ada")
    assert kept.version == 1
    await holder.close()
    await waiting.close()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_process_that_stands_still_in_a_write_loses_it(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "MAX_SILENCE_S", 1)
    frozen = await Store.open(store_url)

    async def stand_still() -> None:
        async with frozen._database.writing() as write:
            await history.add(write, pin(1), {}, "frozen")
            await store.pin(pin(2), actor="ada")  # waits until the server has had enough
            await history.add(write, pin(1), {}, "frozen")

    with pytest.raises(StoreError, match="terminat"):
        await stand_still()
    (kept,) = await store.history(KEY)
    assert kept.record.depth == 2
    await frozen.close()


async def test_an_activation_of_what_was_never_kept_is_refused_by_the_database(
    store: Store, store_url: str
) -> None:
    insert = (
        "INSERT INTO activations (sequence, base, adapter, version, action, actor, at) "
        "VALUES (1, 'a', 'b', 1, 'activate', 'me', '2026-01-01 00:00:00')"
    )
    with pytest.raises(StoreError, match=r"(?i)foreign key"):
        async with store._database.writing() as write:
            await write.session.execute(text(insert))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "cannot be read"),
        ("fathom.db", "cannot be read"),
        ("postgresql://ada:S3CR:3T@host:port/db", "cannot be read"),
        ("postgresql://ada:S3CR@3T@host/db", "percent-encode"),
        ("mysql://ada:S3CR3T@host/db", "no database is called 'mysql'"),
        ("postgresql+asyncpg://ada:S3CR3T@host/db", "postgresql://USER@HOST/NAME"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:///fathom.db?mode=ro", "takes no options"),
        ("sqlite://folder/fathom.db", "no host"),
        ("sqlite:////no/such/folder/fathom.db", "'/no/such/folder' does not exist"),
    ],
)
async def test_a_url_that_means_no_database_is_refused(url: str, why: str) -> None:
    assert re.search(why, await refusal(url))


async def test_what_sqlite_cannot_open_is_said(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("The sea is calm tonight. " * 100)
    assert "not a database" in await refusal(f"sqlite:///{tmp_path / 'poem.txt'}")
    assert "unable to open" in await refusal(f"sqlite:///{tmp_path}")


async def test_what_postgresql_refuses_is_said(postgres: Postgres) -> None:
    url = postgres.fresh_url()
    postgres.take_back(url)
    nowhere = re.sub(r"/test_\d+", "/nowhere", url)
    assert 'database "nowhere" does not exist' in await refusal(nowhere)
    assert 'role "eve" does not exist' in await refusal(url.replace("fathom@", "eve:S3CR3T@"))
    with socket.socket() as free:  # bound but not listening, so nobody else listens there
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        message = await refusal(f"postgresql://ada:S3CR3T@127.0.0.1:{port}/db")
    assert "refused" in message
    assert str(port) in message


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
async def test_every_name_of_postgresql_is_accepted(postgres: Postgres, scheme: str) -> None:
    url = postgres.fresh_url()
    await opened(url.replace("postgresql", scheme))
    postgres.take_back(url)


async def test_a_database_whose_encoding_is_none_keeps_text_as_utf_8(postgres: Postgres) -> None:
    url = postgres.fresh_url()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0")
    store = await Store.open(re.sub(r"/test_\d+", "/ascii", url))
    try:
        kept = await store.add_boundary(pin(), evidence={}, actor="Zoë ☃")
        found = await store.boundary(kept.id)
    finally:
        await store.close()
    assert found is not None
    assert found.actor == "Zoë ☃"
    postgres.take_back(url)


async def test_a_missing_driver_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    message = await refusal("postgresql://ada:S3CR3T@host/db")
    assert "pip install 'fathom-lora[postgres]'" in message


async def test_a_server_that_came_back_is_used_again(postgres: Postgres) -> None:
    url = postgres.fresh_url()
    store = await Store.open(url)
    await store.pin(pin(), actor="ada")
    name = re.search(r"test_\d+", url)
    assert name is not None
    other_url = postgres.fresh_url()
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name[0]}'"
    assert asking(other_url, lambda connection: connection.execute(text(end)).all())
    kept, _ = await store.pin(pin(), actor="ada")
    assert kept.version == 2
    await store.close()
    for each in (url, other_url):
        postgres.take_back(each)
