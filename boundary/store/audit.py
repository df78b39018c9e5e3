"""The audit trail: who did what to what, when, for which request, and how it ended.

What the store itself does is written in the transaction that does it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from boundary.store.database import Write
from boundary.store.tables import AuditRow

Outcome = Literal["ok", "refused", "failed"]
Column = Literal["actor", "action", "outcome", "request_id"]
"""What entries can be asked for by."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that was done or tried.

    id: larger than that of every entry before.
    subject: `boundary:ID`, `adapter:FINGERPRINT`, `job:ID`, or a caller's own.
    outcome: `ok`, `refused` for what nobody was allowed, `failed` for what could not be done.
    request_id: the request that asked for it, if a request did.
    """

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]
    outcome: str = "ok"
    request_id: str | None = None


async def note(
    write: Write,
    *,
    actor: str,
    action: str,
    subject: str,
    details: Mapping[str, Any],
    outcome: Outcome = "ok",
) -> AuditEntry:
    """Add an entry. actor: a name, or `NAME:REQUEST_ID` of who acts through a request."""
    name, _, request_id = actor.partition(":")
    row = AuditRow(
        at=write.now,
        actor=name,
        action=action,
        subject=subject,
        details=dict(details),
        outcome=outcome,
        request_id=request_id or None,
    )
    write.session.add(row)
    await write.session.flush()
    return _entry(row)


async def entries(
    session: AsyncSession, limit: int, before: int | None, where: Mapping[Column, str]
) -> list[AuditEntry]:
    """The newest first; see `Store.audit`."""
    query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    if before is not None:
        query = query.where(AuditRow.id < before)
    for column, value in where.items():
        query = query.where(getattr(AuditRow, column) == value)
    return [_entry(row) for row in await session.scalars(query)]


def _entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        row.id,
        row.at,
        row.actor,
        row.action,
        row.subject,
        row.details,
        row.outcome,
        row.request_id,
    )
