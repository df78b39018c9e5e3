"""The tables of keys and usage, beside the calibrations' in the same database.

They are migrated by revisions of their own, so that `boundary`, which knows nothing of them, can
open a database that has them. `migrations/` makes these tables; a test holds the two against each
other.
"""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, Index, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from boundary.store import tables
from boundary.store.database import Schema

VERSION_TABLE = "server_version"
SCHEMA = Schema("server.access:migrations", VERSION_TABLE)


class Base(DeclarativeBase):
    """Values are kept, and constraints named, as in the calibrations' tables."""

    metadata = MetaData(naming_convention=tables.Base.metadata.naming_convention)
    type_annotation_map: ClassVar = tables.Base.type_annotation_map


class KeyRow(Base):
    """A key: changed only when it is revoked, never deleted."""

    __tablename__ = "api_keys"
    __table_args__ = (
        CheckConstraint("scope IN ('api', 'admin')", "scope"),
        Index("uq_api_keys_sequence", "sequence", unique=True),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    scope: Mapped[str]
    hash: Mapped[str]
    limits: Mapped[dict[str, Any]]
    actor: Mapped[str]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    sequence: Mapped[int] = mapped_column(BigInteger)
    """Of its last change; larger than that of every change before, in the whole table."""


class UsageRow(Base):
    """What one key used of one model at one effective depth in one hour."""

    __tablename__ = "usage"

    hour: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """Since 1970, in UTC."""
    key: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    """Empty for the base model, because no part of a primary key is NULL."""
    depth: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    aborted_requests: Mapped[int] = mapped_column(BigInteger)
    aborted_prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    aborted_completion_tokens: Mapped[int] = mapped_column(BigInteger)


class UsageWriterRow(Base):
    """How far one process has come with writing usage: a row a start, kept."""

    __tablename__ = "usage_writers"

    id: Mapped[str] = mapped_column(primary_key=True)
    batch: Mapped[int] = mapped_column(BigInteger)
    """The newest that was added; they are numbered upwards."""
