"""Keys in the database, for every server that shares it.

Each change takes the next number of one sequence, so that a server asks only for what has changed
since it last did, and writes its audit entry in the same transaction. Everything may raise StoreError.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

import structlog
from sqlalchemy import func, select

from boundary.store import audit
from boundary.store.database import Database, Write
from server.access import secret
from server.access.hashed_key import HashedKey, NoSuchKey
from server.access.key import Grant, Key, NewKey, Scope
from server.access.tables import SCHEMA, KeyRow

log = structlog.get_logger(__name__)


class KeyStore:
    """The keys of one database; made by `open`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, database: Database) -> "KeyStore":
        """Bring the tables up to date; closing the database is the caller's. Raises StoreError."""
        await database.migrate(SCHEMA)
        return cls(database)

    async def create(self, new: NewKey, actor: str) -> tuple[HashedKey, str]:
        """Make a key; gives also its text, which is kept nowhere."""
        # Hashed before: a write holds the whole database.
        made, text = await secret.aside(HashedKey.make, new, "database", datetime.now(UTC))
        async with self._database.writing() as write:
            made = replace(made, created_at=write.now)
            write.session.add(
                KeyRow(
                    id=made.key.id,
                    name=new.name,
                    scope=new.scope,
                    hash=made.hash,
                    limits=dict(new.grant.described()),
                    actor=actor,
                    created_at=made.created_at,
                    revoked_at=None,
                    sequence=await _next(write),
                )
            )
            details = {"name": new.name, "scope": new.scope, **new.grant.described()}
            await audit.note(
                write,
                actor=actor,
                action="key.create",
                subject=f"key:{made.key.id}",
                details=details,
            )
        return made, text

    async def revoke(self, id: str, actor: str) -> HashedKey:
        """Let a key open nothing from now on; one that is revoked stays as it is. Raises NoSuchKey."""
        async with self._database.writing() as write:
            row = await write.session.get(KeyRow, id)
            if row is None:
                raise NoSuchKey(id)
            if row.revoked_at is None:
                row.revoked_at, row.sequence = write.now, await _next(write)
                await audit.note(
                    write,
                    actor=actor,
                    action="key.revoke",
                    subject=f"key:{id}",
                    details={"name": row.name},
                )
            return _hashed_key(row)

    async def changed_since(self, sequence: int) -> tuple[Sequence[HashedKey], int]:
        """Keys made or revoked after a number, oldest change first, and the newest number."""
        query = select(KeyRow).where(KeyRow.sequence > sequence).order_by(KeyRow.sequence)
        async with self._database.reading() as session:
            rows = list(await session.scalars(query))
            newest = rows[-1].sequence if rows else sequence
            return [_hashed_key(row) for row in rows], newest


async def _next(write: Write) -> int:
    """The writer is alone: the newest number plus one."""
    return (await write.session.scalar(select(func.max(KeyRow.sequence))) or 0) + 1


def _hashed_key(row: KeyRow) -> HashedKey:
    """A row as keyrings know it. One that this version cannot read opens nothing, like one revoked."""
    revoked_at = row.revoked_at
    try:
        grant = Grant.model_validate(row.limits)
        if not secret.is_hash(row.hash):
            raise ValueError("its hash is of another kind")
    except ValueError:  # a newer version's limit: to ignore it would be to lift it
        log.warning("a key cannot be read and opens nothing: upgrade Fathom", key=row.id)
        grant, revoked_at = Grant(), revoked_at or row.created_at
    key = Key(row.id, row.name, cast(Scope, row.scope), grant, "database")
    return HashedKey(key, row.hash, row.created_at, revoked_at)
