"""The depths in force: what the store says is active, told to the engine that serves.

Loaded when the server starts, then followed twice a second, so that a decision of any process that
shares the store is soon in force in all of them. One made through this process is in force for new
requests before its answer is sent. While the store cannot be reached the last known depths stay.
"""

import asyncio

import structlog

from boundary.record import BoundaryRecord
from boundary.store.store import (
    Activation,
    AdapterKey,
    NoSuchVersion,
    Store,
    StoredBoundary,
    UnreadableRecord,
)
from server.engine.protocol import Engine
from server.engine.request import AdapterRef, CalibratedDepth
from server.errors import BadRequest, Conflict
from server.following import Trouble, follow

log = structlog.get_logger(__name__)

POLL_S = 0.5
IMPORTER = "boundary.json"
"""The actor of a record that came with an adapter's files."""


class Boundaries:
    """Keeps one engine's calibrated depths as one store has them."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine = engine
        self._store = store
        self._sequence = 0
        self._depths: dict[str, CalibratedDepth | None] = {}
        self._refusals: dict[str, str] = {}
        self._imported: set[str | None] = set()
        self._seen: list[AdapterRef] | None = None
        """The list of adapters that was last gone through for records to import."""
        self._in_turn = asyncio.Lock()
        self.trouble = Trouble(
            log, "calibrated depths stay as they are", "calibrated depths are followed again"
        )

    def key(self, adapter: AdapterRef) -> AdapterKey:
        """What the store calls an adapter's content on this base; it must have been read."""
        assert adapter.digest is not None
        return AdapterKey(self._engine.info.revision, adapter.digest)

    def refusal(self, digest: str) -> str | None:
        """Why the active record of an adapter's content is not applied, if it is not."""
        return self._refusals.get(digest)

    async def refresh(self) -> None:
        """Take over whatever was decided since the last time. Raises StoreError; then nothing changed.

        A record beside an adapter that has no history yet begins one.
        """
        async with self._in_turn:
            await self._import_new()
            activations = await self._store.active_since(self._sequence)
            depths, refusals = dict(self._depths), dict(self._refusals)
            for activation in activations:
                if activation.key.base != self._engine.info.revision:
                    continue  # another server's, which shares the store
                digest = activation.key.adapter
                depths[digest], refusal = await self._depth(activation)
                refusals.pop(digest, None)
                if refusal is not None:
                    refusals[digest] = refusal
                    log.warning("calibrated depth not applied", adapter=digest, reason=refusal)
            if activations:
                self._sequence = activations[-1].sequence
                self._depths, self._refusals = depths, refusals
                self._engine.set_calibrated_depths(depths)

    async def follow(self, stop: asyncio.Event) -> None:
        """Refresh until told to stop; a store that cannot be reached is tried again."""
        bug = "calibrated depths stay as they are"
        await follow(self.refresh, stop, POLL_S, log, bug, self.trouble)

    async def activate(
        self, adapter: AdapterRef, version: int, *, actor: str, reason: str | None
    ) -> Activation:
        """Let an older or newer version count, in force here on return.

        Raises NoSuchVersion, StoreError, and Conflict for one that does not fit what is loaded.
        """
        key = self.key(adapter)
        kept = await self._store.version(key, version)
        if kept is None:
            raise NoSuchVersion(key, version)
        if (mismatch := self._mismatch(kept.record, key)) is not None:
            raise Conflict(f"version {version} of adapter {adapter.name!r} was {mismatch}")
        active = await self._store.active(key)
        is_older = active is not None and version < active.version
        activation = await self._store.activate(
            key,
            version,
            action="roll_back" if is_older else "activate",
            actor=actor,
            reason=reason,
        )
        await self.refresh()
        return activation

    async def pin(
        self, adapter: AdapterRef, depth: int, *, actor: str, reason: str
    ) -> tuple[StoredBoundary, Activation]:
        """Let a depth count that somebody decided, in force here on return.

        Raises StoreError, and BadRequest for a depth that the model does not have.
        """
        num_layers = self._engine.info.num_layers
        if not 0 <= depth <= num_layers:
            raise BadRequest(
                f"'depth' must be from 0 to {num_layers} (the model's layers), got {depth}",
                param="depth",
            )
        key = self.key(adapter)
        record = BoundaryRecord.pinned(
            depth, num_layers, reason, base=key.base, adapter=key.adapter
        )
        pinned = await self._store.pin(record, actor=actor)
        await self.refresh()
        return pinned

    async def _import_new(self) -> None:
        adapters = self._engine.adapters()
        if adapters is self._seen:
            return  # thousands are not gone through twice a second
        for adapter in adapters:
            if adapter.boundary is None or adapter.digest in self._imported:
                continue
            await self._store.import_first(adapter.boundary, actor=IMPORTER)
            self._imported.add(adapter.digest)
        self._seen = adapters

    async def _depth(self, activation: Activation) -> tuple[CalibratedDepth | None, str | None]:
        """What an activation means here, and why it means nothing if it does."""
        if activation.boundary_id is None:
            return None, None
        try:
            kept = await self._store.boundary(activation.boundary_id)
        except UnreadableRecord as error:
            return None, str(error)
        assert kept is not None  # records are never deleted
        if (mismatch := self._mismatch(kept.record, activation.key)) is not None:
            return None, f"version {kept.version} was {mismatch}"
        made_at = kept.record.created_at.timestamp()
        return CalibratedDepth(kept.record.depth, kept.version, made_at), None

    def _mismatch(self, record: BoundaryRecord, key: AdapterKey) -> str | None:
        info = self._engine.info
        return record.mismatch(base=info.revision, adapter=key.adapter, num_layers=info.num_layers)
