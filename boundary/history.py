"""What was found out about an adapter, which of it is active, and who decided that.

History belongs to content, not to a name: the same weights under another name have the same
history, and new weights under an old name begin a new one. Nothing is ever changed or deleted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from boundary.record import BoundaryRecord

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


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what to which subject (`boundary:ID`, `adapter:FINGERPRINT`, `job:ID`), and when."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]
