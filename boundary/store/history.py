"""What was found out about an adapter, which of it is active, and who decided that.

History belongs to content, not to a name: the same weights under another name have the same
history, and new weights under an old name begin a new one. Nothing is ever changed or deleted.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast
from uuid import uuid4

from pydantic import ValidationError
from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from boundary.record import BoundaryRecord
from boundary.store import audit
from boundary.store.database import StoreError, Write
from boundary.store.tables import ActivationRow, BoundaryRow

MAX_VERSION = 2**31 - 1
"""The largest number that the column holds."""


Action = Literal["activate", "roll_back", "pin", "import", "deactivate"]


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One adapter's content on one base model, both by fingerprint."""

    base: str
    adapter: str

    @classmethod
    def of(cls, record: BoundaryRecord) -> "AdapterKey":
        """What a record was made for."""
        return cls(record.base_fingerprint, record.adapter_fingerprint)


@dataclass(frozen=True, slots=True)
class StoredBoundary:
    """A record as it is kept.

    id: 32 hexadecimal digits.
    version: 1, 2, ... among the records of the same key.
    evidence: what a reader wants beside the record: controls, diagnostics, sample outputs; JSON.
    """

    id: str
    version: int
    record: BoundaryRecord
    evidence: Mapping[str, Any]
    actor: str
    created_at: datetime

    @property
    def key(self) -> AdapterKey:
        """What the record was made for."""
        return AdapterKey.of(self.record)


@dataclass(frozen=True, slots=True)
class Activation:
    """One decision about which record counts; the newest of a key is in force.

    sequence: grows over the whole database, in the order in which decisions became visible.
    boundary_id, version, depth: of the record; all None after `deactivate`, which means full.
    """

    sequence: int
    key: AdapterKey
    boundary_id: str | None
    version: int | None
    depth: int | None
    action: Action
    actor: str
    reason: str | None
    at: datetime


class NoSuchVersion(StoreError):
    """An adapter has no version of this number."""

    def __init__(self, key: AdapterKey, version: int) -> None:
        super().__init__(f"adapter content {key.adapter} has no version {version} on this base")
        self.version = version


class UnreadableRecord(StoreError):
    """What is kept under an id is no record that this version understands."""


async def add(
    write: Write, record: BoundaryRecord, evidence: Mapping[str, Any], actor: str
) -> StoredBoundary:
    """Keep a record as the next version of its key."""
    key = AdapterKey.of(record)
    newest = await write.session.scalar(select(func.max(BoundaryRow.version)).where(_of(key)))
    row = BoundaryRow(
        id=uuid4().hex,
        base=key.base,
        adapter=key.adapter,
        version=(newest or 0) + 1,
        depth=record.depth,
        record=record.model_dump(mode="json"),
        evidence=dict(evidence),
        actor=actor,
        created_at=write.now,
    )
    write.session.add(row)
    details = {
        "adapter": key.adapter,
        "base": key.base,
        "version": row.version,
        "depth": record.depth,
        "method": record.method,
    }
    subject = f"boundary:{row.id}"
    await audit.note(write, actor=actor, action="boundary.add", subject=subject, details=details)
    return StoredBoundary(row.id, row.version, record, evidence, actor, write.now)


async def activate(
    write: Write,
    key: AdapterKey,
    version: int | None,
    *,
    action: Action,
    actor: str,
    reason: str | None,
) -> Activation:
    """Note a decision; raises NoSuchVersion. The writer is alone: the newest number plus one."""
    if (version is None) != (action == "deactivate"):
        raise ValueError(f"action {action!r} does not go with version {version}")
    row = None if version is None else await _row(write.session, key, version)
    if version is not None and row is None:
        raise NoSuchVersion(key, version)
    newest = await write.session.scalar(select(func.max(ActivationRow.sequence)))
    before = await active_row(write.session, key)
    activation = Activation(
        sequence=(newest or 0) + 1,
        key=key,
        boundary_id=None if row is None else row.id,
        version=version,
        depth=None if row is None else row.depth,
        action=action,
        actor=actor,
        reason=reason,
        at=write.now,
    )
    write.session.add(
        ActivationRow(
            sequence=activation.sequence,
            base=key.base,
            adapter=key.adapter,
            version=version,
            action=action,
            actor=actor,
            reason=reason,
            at=write.now,
        )
    )
    details = {
        "base": key.base,
        "version": version,
        "depth": activation.depth,
        "previous_version": before and before.version,
        "previous_depth": before and before.depth,
        "reason": reason,
    }
    await audit.note(
        write,
        actor=actor,
        action=f"boundary.{action}",
        subject=f"adapter:{key.adapter}",
        details=details,
    )
    return activation


async def add_active(
    write: Write, record: BoundaryRecord, evidence: Mapping[str, Any], *, action: Action, actor: str
) -> tuple[StoredBoundary, Activation]:
    """Keep a record that counts from the beginning, for its own reason if it has one."""
    boundary = await add(write, record, evidence, actor)
    activation = await activate(
        write, boundary.key, boundary.version, action=action, actor=actor, reason=record.reason
    )
    return boundary, activation


async def active_row(session: AsyncSession, key: AdapterKey) -> BoundaryRow | None:
    """The record that the newest activation names, if it names one."""
    newest = select(func.max(ActivationRow.sequence)).where(
        ActivationRow.base == key.base, ActivationRow.adapter == key.adapter
    )
    query = (
        select(BoundaryRow)
        .join(ActivationRow, _is_named)
        .where(ActivationRow.sequence == newest.scalar_subquery())
    )
    return await session.scalar(query)


async def has_any(session: AsyncSession, key: AdapterKey) -> bool:
    """Whether anything was ever kept for a key."""
    return await session.scalar(select(func.max(BoundaryRow.version)).where(_of(key))) is not None


async def newest_first(session: AsyncSession, key: AdapterKey, limit: int) -> list[StoredBoundary]:
    """The records of a key; see `Store.history`."""
    query = select(BoundaryRow).where(_of(key)).order_by(BoundaryRow.version.desc()).limit(limit)
    return [stored(row) for row in await session.scalars(query)]


async def by_id(session: AsyncSession, id: str) -> StoredBoundary | None:
    """One record."""
    row = await session.get(BoundaryRow, id) if is_id(id) else None
    return None if row is None else stored(row)


async def by_version(session: AsyncSession, key: AdapterKey, version: int) -> StoredBoundary | None:
    """One record of a key."""
    row = await _row(session, key, version)
    return None if row is None else stored(row)


async def active_since(session: AsyncSession, sequence: int) -> list[Activation]:
    """The newest activation of each key that changed; see `Store.active_since`."""
    newest = (
        select(func.max(ActivationRow.sequence))
        .where(ActivationRow.sequence > sequence)
        .group_by(ActivationRow.base, ActivationRow.adapter)
    )
    query = (
        select(ActivationRow, BoundaryRow.id, BoundaryRow.depth)
        .outerjoin(BoundaryRow, _is_named)
        .where(ActivationRow.sequence.in_(newest))
        .order_by(ActivationRow.sequence)
    )
    return [
        Activation(
            sequence=row.sequence,
            key=AdapterKey(row.base, row.adapter),
            boundary_id=boundary_id,
            version=row.version,
            depth=depth,
            action=cast(Action, row.action),
            actor=row.actor,
            reason=row.reason,
            at=row.at,
        )
        for row, boundary_id, depth in await session.execute(query)
    ]


def is_id(id: str) -> bool:
    """Whether a string can be the id of a boundary or a job, before a database is asked."""
    return re.fullmatch("[0-9a-f]{32}", id) is not None


def stored(row: BoundaryRow) -> StoredBoundary:
    """A row as what callers see; raises UnreadableRecord."""
    try:
        record = BoundaryRecord.model_validate_json(json.dumps(row.record))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise UnreadableRecord(f"boundary {row.id} cannot be read: {first['msg']}") from error
    return StoredBoundary(row.id, row.version, record, row.evidence, row.actor, row.created_at)


_is_named = and_(
    BoundaryRow.base == ActivationRow.base,
    BoundaryRow.adapter == ActivationRow.adapter,
    BoundaryRow.version == ActivationRow.version,
)


async def _row(session: AsyncSession, key: AdapterKey, version: int) -> BoundaryRow | None:
    if not 1 <= version <= MAX_VERSION:
        return None
    return await session.scalar(
        select(BoundaryRow).where(_of(key)).where(BoundaryRow.version == version)
    )


def _of(key: AdapterKey) -> ColumnElement[bool]:
    return and_(BoundaryRow.base == key.base, BoundaryRow.adapter == key.adapter)
