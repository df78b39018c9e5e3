"""The database under the store: what a URL means, how it is opened, and how it is written.

**One writer at a time.** A write holds the whole database: SQLite by `BEGIN IMMEDIATE`, PostgreSQL
by an advisory lock until the end of the transaction. So versions and sequence numbers are the
largest so far plus one, become visible in their order, and nobody reads what another is about to
change. Writes are rare and short; readers never wait.

**One clock.** A write's time is the database's: the server's clock for PostgreSQL, read after the
lock was had; for SQLite, whose file one machine has open, that machine's. So leases compare on
hosts whose clocks differ.

Knows no tables: a `Schema` says where revisions of them lie, and several share a database. Every
failure leaves as StoreError.
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

PATIENCE_S = 10
"""How long a write waits for others, and a connection for its server."""
RETRY_S = 0.02
MAX_SILENCE_S = 30
"""A PostgreSQL server ends a write whose process has stood still for so long: it holds the lock."""
LOCK = 0x666174686F6D
"""PostgreSQL's advisory locks are numbers; this one reads "fathom"."""

_migrating = threading.Lock()
"""Alembic keeps the running migration in module globals, so a process runs one at a time."""


class StoreError(Exception):
    """The store cannot do what was asked, in one line that never shows a password."""


@dataclass(frozen=True, slots=True)
class Write:
    """A transaction that is alone in the database, and the time that it writes."""

    session: AsyncSession
    now: datetime


@dataclass(frozen=True, slots=True)
class Schema:
    """Tables that are migrated together: where alembic finds their revisions, and keeps how far it is."""

    location: str
    version_table: str


CALIBRATION = Schema("boundary.store:migrations", "alembic_version")


class Database:
    """Connections to one migrated database; made by `open`."""

    def __init__(self, engine: AsyncEngine, url: URL, password: str | None) -> None:
        self._url = url
        self._engine = engine
        self._writer = engine.execution_options(is_write=True)
        self._password = password
        self._in_turn = asyncio.Lock()  # SQLite's own queue is sleeping and trying again

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect and migrate to the newest revision. Raises StoreError."""
        parsed = _parse(url)
        password = parsed.password if isinstance(parsed.password, str) else None
        with _as_store_error(password):
            await asyncio.to_thread(_migrate, parsed, CALIBRATION)
            is_sqlite = parsed.drivername == "sqlite"
            asynchronous = parsed.set(drivername="sqlite+aiosqlite") if is_sqlite else parsed
            engine = create_async_engine(asynchronous, **_options(parsed))
            if is_sqlite:
                _listen(engine.sync_engine)
        return cls(engine, parsed, password)

    async def migrate(self, schema: Schema) -> None:
        """Bring other tables that share the database to their newest revision. Raises StoreError."""
        with _as_store_error(self._password):
            await asyncio.to_thread(_migrate, self._url, schema)

    async def close(self) -> None:
        """Close all connections; idempotent."""
        await self._engine.dispose()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A transaction that reads; each statement sees all that is committed when it begins."""
        with _as_store_error(self._password):
            async with AsyncSession(self._engine) as session, session.begin():
                yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Write]:
        """A transaction alone in the database, committed at the end unless the body raises."""
        with _as_store_error(self._password):
            async with (
                self._in_turn,
                AsyncSession(self._writer, expire_on_commit=False) as session,
                session.begin(),
            ):
                connection = await session.connection()
                yield Write(session, await connection.run_sync(_lock))


def _parse(url: str) -> URL:
    """A URL with the drivers that this library uses; raises StoreError that never repeats it."""
    schemes = {
        "sqlite": "sqlite",
        "sqlite+aiosqlite": "sqlite",
        "postgres": "postgresql+psycopg",
        "postgresql": "postgresql+psycopg",
        "postgresql+psycopg": "postgresql+psycopg",
    }
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):  # its message may hold half of a password
        raise StoreError("the database URL cannot be read") from None
    if parsed.drivername not in schemes:
        raise StoreError(
            f"no database is called {parsed.drivername!r}: use sqlite:///PATH or "
            "postgresql://USER@HOST/NAME"
        )
    parsed = parsed.set(drivername=schemes[parsed.drivername])
    if parsed.drivername == "sqlite":
        if parsed.host:
            raise StoreError("a SQLite URL has no host: sqlite:///relative or sqlite:////absolute")
        if parsed.database in (None, "", ":memory:"):
            raise StoreError("a SQLite database needs a file, which every connection sees")
        if parsed.query:
            raise StoreError("a SQLite URL takes no options")
        folder = Path(str(parsed.database)).parent
        if not folder.is_dir():
            raise StoreError(f"the database's directory {str(folder)!r} does not exist")
    elif "@" in (parsed.host or "") or "@" in (parsed.database or ""):
        raise StoreError(
            "the database URL's password has characters to percent-encode, as @ is %40"
        )
    return parsed


def _options(url: URL) -> dict[str, Any]:
    """Arguments of an engine, synchronous or not."""
    if url.drivername == "sqlite":
        # Transactions are begun below: the driver's own begin with the first write, too late.
        return {"connect_args": {"isolation_level": None, "timeout": PATIENCE_S}}
    # Without a word on it the driver takes the database's encoding, and where that is SQL_ASCII, which
    # initdb chooses where no locale is set, text comes as bytes.
    arguments: dict[str, object] = {"client_encoding": "utf8"}
    if "connect_timeout" not in url.query:
        arguments["connect_timeout"] = PATIENCE_S
    return {
        "connect_args": arguments,
        "isolation_level": "READ COMMITTED",
        "pool_pre_ping": True,  # a restart of the server breaks what lies in the pool
    }


def _listen(engine: Engine) -> None:
    """Set up SQLite's connections and begin its transactions, which its driver no longer does."""

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA synchronous = FULL")  # what was answered outlives a power cut
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        is_write = connection.get_execution_options().get("is_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _lock(connection: Connection) -> datetime:
    """Be the only writer until the transaction ends, and say when that began."""
    if connection.dialect.name == "sqlite":
        return datetime.now(UTC)
    limits = (("lock_timeout", PATIENCE_S), ("idle_in_transaction_session_timeout", MAX_SILENCE_S))
    connection.execute(select(*(func.set_config(name, f"{s}s", True) for name, s in limits)))
    connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def _migrate(url: URL, schema: Schema) -> None:
    """Bring a schema's tables to the newest revision in one write; runs in a thread of its own."""
    try:
        engine = create_engine(url, **_options(url)).execution_options(is_write=True)
    except ImportError as error:
        raise StoreError(
            f"PostgreSQL needs a driver ({error}): pip install 'fathom-lora[postgres]'"
        ) from error
    try:
        if url.drivername == "sqlite":
            _keep_write_ahead_log(str(url.database))
            _listen(engine)
        config = Config()
        config.set_main_option("script_location", schema.location)
        with _migrating, engine.begin() as connection:
            _lock(connection)
            script = ScriptDirectory.from_config(config)
            known = {revision.revision for revision in script.walk_revisions()}
            options = {"version_table": schema.version_table}
            migration = MigrationContext.configure(connection, opts=options)
            for found in migration.get_current_heads():
                if found not in known:
                    raise StoreError(
                        f"the database is at revision {found!r}, which this version of Fathom does "
                        f"not know (its newest is {script.get_current_head()!r}): upgrade Fathom"
                    )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def _keep_write_ahead_log(path: str) -> None:
    """Let readers and a writer not wait for each other; the file stays so.

    SQLite tells whoever asks while another does that the database is locked, at once, whatever the
    timeout: its busy handler is not called where two would wait for each other.
    """
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            with closing(sqlite3.connect(path, timeout=PATIENCE_S)) as connection:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.Error as error:
            is_busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > give_up_at:
                raise StoreError(f"database: {error}") from error
            time.sleep(RETRY_S)
    if mode != "wal":  # a network's file system
        raise StoreError(f"SQLite cannot keep a write-ahead log there, only {mode!r}")


@contextmanager
def _as_store_error(password: str | None) -> Iterator[None]:
    """Turn what drivers and SQLAlchemy raise into one line."""
    try:
        yield
    except (SQLAlchemyError, CommandError, OverflowError) as error:
        cause = error.orig if isinstance(error, StatementError) else None
        line = " ".join(str(cause or error).split())
        if password:
            line = line.replace(password, "***")
        raise StoreError(f"database: {line}") from error
