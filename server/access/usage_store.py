"""Usage in the database: added to by every server that shares it, and summed when somebody asks.

Everything may raise StoreError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sqlalchemy import BigInteger, ColumnElement, Select, func, literal_column, select
from sqlalchemy.dialects import postgresql, sqlite

from boundary.store.database import Database, Write
from server.access.counts import Account, Counts
from server.access.tables import UsageRow, UsageWriterRow

Bucket = Literal["hour", "day", "all"]

BATCH = 500
"""Rows of one statement: SQLite takes 32,766 values, and a row has twelve."""

_NAMES = [field.name for field in fields(Counts)]
_KEY = ("hour", "key", "base", "adapter", "depth")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which usage: each part that is not None must hold. Hours as in `Account`, `until` left out."""

    key: str | None = None
    base: str | None = None
    adapter: str | None = None
    """Empty is the base model."""
    since: int | None = None
    until: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What tells a write that is made again from the next: its writer, and a number that grows."""

    writer: str
    number: int


class UsageStore:
    """The usage of one database whose tables `KeyStore.open` has brought up to date."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, usage: Mapping[Account, Counts], batch: Batch | None = None) -> None:
        """Add to what is there, in one transaction: all of it or nothing.

        batch: it is added once, however often it is given. A database that goes away while it commits
        leaves its client without an answer; whoever then asks again must not count twice.
        """
        rows = [
            asdict(account) | {"adapter": account.adapter or ""} | asdict(counts)
            for account, counts in usage.items()
        ]
        async with self._database.writing() as write:
            if batch is not None and not await _begins(write, batch):
                return
            is_sqlite = write.session.get_bind().dialect.name == "sqlite"
            make = sqlite.insert if is_sqlite else postgresql.insert
            for start in range(0, len(rows), BATCH):
                insert: Any = make(UsageRow).values(rows[start : start + BATCH])
                added = {
                    name: getattr(UsageRow, name) + getattr(insert.excluded, name)
                    for name in _NAMES
                }
                await write.session.execute(
                    insert.on_conflict_do_update(index_elements=list(_KEY), set_=added)
                )

    async def sums(
        self, filter: Filter, bucket: Bucket, limit: int, offset: int = 0
    ) -> Sequence[tuple[Account, Counts]]:
        """Sums by bucket, key, model and depth, the newest bucket first.

        The account's hour is the bucket's first; 0 where the bucket is all time.
        """
        first = _first_hour(bucket)
        time: list[ColumnElement[int]] = [] if bucket == "all" else [first]
        names = [getattr(UsageRow, name) for name in _KEY[1:]]
        query = (
            _filtered(select(first, *names, *_sums()), filter)
            .group_by(*time, *names)
            .order_by(*(each.desc() for each in time), *names)
            .limit(limit)
            .offset(offset)
        )
        async with self._database.reading() as session:
            rows = (await session.execute(query)).all()
        return [
            (
                Account(int(hour), key, base, adapter or None, depth),
                Counts(*(int(each) for each in sums)),
            )
            for hour, key, base, adapter, depth, *sums in rows
        ]

    async def total(self, filter: Filter) -> Counts:
        """The sum over everything."""
        async with self._database.reading() as session:
            (row,) = (await session.execute(_filtered(select(*_sums()), filter))).all()
        return Counts(*(int(each) for each in row))


async def _begins(write: Write, batch: Batch) -> bool:
    """Note that a batch is being added; whether it was not before."""
    row = await write.session.get(UsageWriterRow, batch.writer)
    if row is not None and row.batch >= batch.number:
        return False
    await write.session.merge(UsageWriterRow(id=batch.writer, batch=batch.number))
    return True


def _first_hour(bucket: Bucket) -> ColumnElement[int]:
    # Numbers in the text: PostgreSQL takes two parameters for different, however equal.
    if bucket == "all":
        return literal_column("0", BigInteger)
    if bucket == "day":
        return UsageRow.hour - UsageRow.hour % literal_column("24", BigInteger)
    return UsageRow.__table__.c.hour


def _sums() -> list[ColumnElement[Any]]:
    return [func.coalesce(func.sum(getattr(UsageRow, name)), 0) for name in _NAMES]


def _filtered(query: Select[Any], filter: Filter) -> Select[Any]:
    for name in ("key", "base", "adapter"):
        value = getattr(filter, name)
        if value is not None:
            query = query.where(getattr(UsageRow, name) == value)
    if filter.since is not None:
        query = query.where(UsageRow.hour >= filter.since)
    if filter.until is not None:
        query = query.where(UsageRow.hour < filter.until)
    return query
