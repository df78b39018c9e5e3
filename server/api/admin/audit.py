"""The audit log of what administrators do over HTTP, and of what they try.

Calibration writes its own entries with the thing done; here are the others, and every refusal. A store
that fails must not undo what was done, so then the entry goes to the log instead.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import Request

from boundary.store.audit import Outcome
from boundary.store.store import StoreError
from boundary.store.tables import storable
from server.api.admin.request import actor
from server.api.error_response import told
from server.calibration.service import CalibrationService
from server.errors import FathomError

log = structlog.get_logger(__name__)


class AuditLog:
    """Writes entries into the store, where the server has one."""

    def __init__(self, calibration: CalibrationService) -> None:
        self._calibration = calibration

    async def record(
        self,
        actor: str,
        action: str,
        target: str,
        outcome: Outcome,
        request_id: str | None,
        detail: Mapping[str, Any],
    ) -> None:
        """Add an entry; never raises for a store that fails.

        actor: a key's name or id, without a colon; never the key.
        """
        if not self._calibration.is_open:
            return
        try:
            await self._calibration.store.add_audit(
                actor=actor if request_id is None else f"{actor}:{request_id}",
                action=action,
                subject=storable(target),
                outcome=outcome,
                details=detail,
            )
        except StoreError as error:
            log.warning(
                "not in the audit log",
                actor=actor,
                action=action,
                target=target,
                outcome=outcome,
                reason=str(error),
            )

    @asynccontextmanager
    async def attempt(
        self, http: Request, action: str, target: str, *, is_noted: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """Record what the block does by how it ends; it may add details.

        is_noted: the store notes it by itself when it succeeds.
        """
        detail: dict[str, Any] = {}
        outcome: Outcome = "ok"
        try:
            yield detail
        except (FathomError, StoreError) as error:
            raised = told(error) if isinstance(error, StoreError) else error
            outcome = "refused" if raised.status < 500 else "failed"
            detail["error"] = raised.code or raised.type
            raise
        except Exception:
            outcome = "failed"
            detail["error"] = "internal_error"
            raise
        finally:
            if outcome != "ok" or not is_noted:
                name, _, request_id = actor(http).partition(":")
                await self.record(name, action, target, outcome, request_id, detail)
