"""The engine's outputs on their way to whoever reads them, on whichever event loop that is."""

import asyncio
from collections import deque
from collections.abc import Iterable

import structlog

from server.engine.mailbox import Mailbox
from server.engine.request import RequestOutput

log = structlog.get_logger(__name__)


class Outbox:
    """Every live stream's mailbox, by request. Its order is kept: what was held goes out first."""

    def __init__(self) -> None:
        self.mailboxes: dict[str, Mailbox] = {}
        self._held: deque[RequestOutput] = deque()

    @property
    def num_held(self) -> int:
        """Outputs that wait for the next `deliver`."""
        return len(self._held)

    def hold(self, outputs: Iterable[RequestOutput]) -> None:
        """Keep them for the next `deliver`, which has to come soon."""
        self._held.extend(outputs)

    def deliver(self, outputs: Iterable[RequestOutput] = ()) -> None:
        """To their readers, after what was held. Any thread may."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, RequestOutput]]] = {}
        for output in (*self._take_held(), *outputs):
            mailbox = self.mailboxes.get(output.request_id)
            if mailbox is not None:  # else its consumer has gone
                by_loop.setdefault(mailbox.loop, []).append((mailbox, output))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:
                log.warning("an event loop closed before its streams ended", streams=len(pairs))

    def _take_held(self) -> list[RequestOutput]:
        taken = []
        while self._held:
            try:
                taken.append(self._held.popleft())
            except IndexError:  # another thread was faster
                break
        return taken


def _put_all(pairs: list[tuple[Mailbox, RequestOutput]]) -> None:
    for mailbox, output in pairs:
        mailbox.put(output)
