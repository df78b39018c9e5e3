"""Work that is done again and again until a server stops, and whose trouble the log is told once.

Whoever keeps up with a store (keys, usage, calibrated depths) goes on with what it has while the store
fails. Knows none of them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from boundary.store.store import StoreError


class Trouble:
    """Says that something fails when it begins to, and that it works when it does again."""

    def __init__(self, log: Any, fails: str, works: str, **words: str) -> None:
        """log: whose line it is. words: what both lines carry."""
        self._log = log
        self._fails = fails
        self._works = works
        self._words = words
        self.is_on = False

    def begins(self, reason: str) -> None:
        """It failed."""
        if not self.is_on:
            self._log.warning(self._fails, **self._words, reason=reason)
        self.is_on = True

    def ends(self) -> None:
        """It worked."""
        if self.is_on:
            self._log.info(self._works, **self._words)
        self.is_on = False


async def follow(
    work: Callable[[], Awaitable[object]],
    stop: asyncio.Event,
    every_s: float,
    log: Any,
    bug: str,
    trouble: Trouble | None = None,
) -> None:
    """Do `work` until told to stop; a store that cannot be reached is tried again, and so is all else.

    trouble: told of StoreError; without one, others say it. bug: what `log` says, with a traceback, of
    anything else.
    """
    while not stop.is_set():
        try:
            await work()
        except StoreError as error:
            if trouble is not None:
                trouble.begins(str(error))
        except Exception:
            log.exception(bug)
        else:
            if trouble is not None:
                trouble.ends()
        await wait_or(stop, every_s)


async def wait_or(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event, but not longer; whether it came."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True
