"""Usage on its way to the store: summed in memory, written in the background once a second.

Nothing here waits and no request does: whoever ends a request adds to a dictionary. What could not
be written is added up and written later; its size is that of the accounts, however many requests
there were. A process that is killed loses what it had not written: requests that ended in the last second,
and in the time that a write takes.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import uuid4

import structlog

from boundary.store.store import StoreError
from server.access.counts import Account, Counts, hour_of
from server.access.key import Key
from server.access.usage_store import Batch, UsageStore
from server.engine.request import LoraSelection
from server.following import Trouble, follow

log = structlog.get_logger(__name__)

FLUSH_S = 1.0
LAST_TRIES = 5
"""Of a process that stops; each waits for the database as long as any write does."""


class Ledger:
    """The usage that one process has not written yet. Used on its event loop alone."""

    def __init__(self, base: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._base = base
        self._now = now
        self._store: UsageStore | None = None
        self._writer = uuid4().hex
        self._num_batches = 0
        self._sent: dict[Account, Counts] = {}
        """The batch that the store is not known to have."""
        self._unwritten: dict[Account, Counts] = {}
        self._in_turn = asyncio.Lock()
        self.trouble = Trouble(
            log, "usage is kept in memory until the store is back", "usage is written again"
        )
        self.num_open = 0
        """Requests that run and are not counted yet; kept by whoever meters them."""
        self.num_written = 0
        """Requests that the store has since the start."""
        self.num_unwritten = 0
        """Those it is not known to have."""

    def attach(self, store: UsageStore) -> None:
        """Keep usage from now on; before that, none is."""
        self._store = store

    def add(self, key: Key, lora: LoraSelection, counts: Counts) -> None:
        """Count what a request came to."""
        if self._store is None:
            return
        account = Account(
            hour_of(self._now()),
            key.id,
            self._base,
            None if lora.adapter is None else lora.adapter.name,
            lora.effective_depth,
        )
        self._unwritten[account] = self._unwritten.get(account, Counts()) + counts
        self.num_unwritten += counts.requests

    async def flush(self) -> None:
        """Write what there is. Raises StoreError; then it is kept for the next time."""
        async with self._in_turn:
            await self._write()  # what was sent before, if that failed
            self._sent, self._unwritten = self._unwritten, {}
            self._num_batches += 1
            await self._write()

    async def _write(self) -> None:
        """Have the store take what was sent, once."""
        if not self._sent or self._store is None:
            return
        await self._store.add(self._sent, Batch(self._writer, self._num_batches))
        num_requests = sum(counts.requests for counts in self._sent.values())
        self._sent = {}
        self.num_written += num_requests
        self.num_unwritten -= num_requests

    async def follow(self, stop: asyncio.Event) -> None:
        """Write once a second until told to stop."""
        await follow(self.flush, stop, FLUSH_S, log, "usage is kept in memory", self.trouble)

    async def close(self) -> None:
        """Write the rest, or say in the log what is lost."""
        for attempt in range(LAST_TRIES):
            try:
                await self.flush()
            except StoreError as error:
                log.warning("usage is not written yet", reason=str(error), attempt=attempt + 1)
                await asyncio.sleep(FLUSH_S)
            else:
                return
        lost = sum((*self._sent.values(), *self._unwritten.values()), Counts())
        log.error(
            "usage is lost: the store could not be written",
            requests=lost.requests,
            prompt_tokens=lost.prompt_tokens,
            completion_tokens=lost.completion_tokens,
        )
