"""The store's tables, as SQLAlchemy models: rows, keys and what the database itself refuses.

Two types make SQLite and PostgreSQL keep the same values: times are UTC in both, and text that
only one of them would take is refused by both. `migrations/` makes these tables; a test holds the
two against each other.
"""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from boundary import strict_json


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC; SQLite, which knows no time zones, keeps it without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Raises ValueError for a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"time {value} has no time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The same instant, in UTC whatever the session's time zone is."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def storable(text: str) -> str:
    """Any text as `PlainText` takes it: an error or a path may repeat what a client or a model wrote."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


class PlainText(TypeDecorator[str]):
    """Unicode text. PostgreSQL takes no NUL, SQLite would; neither is given one."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Raises ValueError for a NUL or half a surrogate pair."""
        if value is None:
            return None
        if "\x00" in value:
            raise ValueError("text holds a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text holds a lone surrogate, which is no Unicode text") from None
        return value


class PlainJson(TypeDecorator[Any]):
    """JSON of any kind; None is the database's NULL."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Raises ValueError for NaN, infinity or half a surrogate pair, TypeError for no JSON."""
        if value is not None:
            strict_json.canonical(value)
        return value


class Base(DeclarativeBase):
    """Every constraint has a name, so that a later migration can speak of it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: UtcDateTime,
        str: PlainText,
        dict[str, Any]: PlainJson,
    }


class BoundaryRow(Base):
    """A record: never changed, never deleted."""

    __tablename__ = "boundaries"
    __table_args__ = (UniqueConstraint("base", "adapter", "version"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str]
    adapter: Mapped[str]
    version: Mapped[int]
    depth: Mapped[int]
    record: Mapped[dict[str, Any]]
    evidence: Mapped[dict[str, Any]]
    actor: Mapped[str]
    created_at: Mapped[datetime]


class ActivationRow(Base):
    """A decision; the foreign key holds it to a version of the same adapter."""

    __tablename__ = "activations"
    __table_args__ = (
        ForeignKeyConstraint(
            ["base", "adapter", "version"],
            ["boundaries.base", "boundaries.adapter", "boundaries.version"],
        ),
        CheckConstraint(
            "(version IS NULL) = (action = 'deactivate')", "version_unless_deactivated"
        ),
        Index(None, "base", "adapter", "sequence"),
    )

    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    base: Mapped[str]
    adapter: Mapped[str]
    version: Mapped[int | None]
    action: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str | None]
    at: Mapped[datetime]


IS_UNFINISHED = text("state IN ('queued', 'running')")


class JobRow(Base):
    """A job; the partial index lets an adapter have one that is not finished, however many ask."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'interrupted')",
            "state",
        ),
        Index(
            "uq_jobs_unfinished",
            "base",
            "adapter",
            unique=True,
            sqlite_where=IS_UNFINISHED,
            postgresql_where=IS_UNFINISHED,
        ),
        Index(None, "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    adapter_name: Mapped[str]
    base: Mapped[str]
    adapter: Mapped[str]
    state: Mapped[str]
    request: Mapped[dict[str, Any]]
    stage: Mapped[str | None]
    done: Mapped[int] = mapped_column(BigInteger)
    total: Mapped[int] = mapped_column(BigInteger)
    boundary_id: Mapped[str | None] = mapped_column(ForeignKey("boundaries.id"))
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None]
    owner: Mapped[str]
    actor: Mapped[str]
    is_cancel_requested: Mapped[bool]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime]
    lease_ends_at: Mapped[datetime]


class AuditRow(Base):
    """Who did what: written with the thing done, never changed, never deleted."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"),  # SQLite counts up plain INTEGER keys only
        primary_key=True,
    )
    at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[dict[str, Any]]
    outcome: Mapped[str] = mapped_column(server_default="ok")
    request_id: Mapped[str | None]
