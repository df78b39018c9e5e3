"""The audit trail: who did what to what, and when, written in the transaction that does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from boundary.store.database import Write
from boundary.store.tables import AuditRow


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing done.

    id: larger than that of every entry before.
    subject: `boundary:ID`, `adapter:FINGERPRINT`, `job:ID`, or a caller's own.
    """

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]


async def note(
    write: Write, *, actor: str, action: str, subject: str, details: Mapping[str, Any]
) -> AuditEntry:
    """Add an entry."""
    row = AuditRow(at=write.now, actor=actor, action=action, subject=subject, details=dict(details))
    write.session.add(row)
    await write.session.flush()
    return _entry(row)


async def entries(session: AsyncSession, limit: int, before: int | None) -> list[AuditEntry]:
    """The newest first; see `Store.audit`."""
    query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    if before is not None:
        query = query.where(AuditRow.id < before)
    return [_entry(row) for row in await session.scalars(query)]


def _entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(row.id, row.at, row.actor, row.action, row.subject, row.details)
