"""Fetching an adapter: the right library, in a bounded time, a bounded number at once.

Blocks the thread that asks, which is never the event loop's nor the engine's. The libraries are
imported when the first adapter of their kind is asked for. What waits too long is told so at once,
though the thread that fetches may first notice at its next piece; it leaves nothing behind.
"""

from concurrent.futures import Future
from pathlib import Path
from threading import BoundedSemaphore, Thread
from typing import Self

from server.config import Settings
from server.environment import default_cache
from server.errors import AdapterError
from server.sources.cache import AdapterCache
from server.sources.files import Fetched, limits
from server.sources.location import BUILT_IN_SCHEMES, RemoteAdapter
from server.sources.meter import Meter

MAX_AT_ONCE = 4


class Fetcher:
    """Brings adapters here, within limits."""

    def __init__(
        self,
        *,
        cache: AdapterCache,
        max_weights_bytes: int,
        timeout_s: float,
        schemes: tuple[str, ...] = (),
    ) -> None:
        """schemes: those of fsspec that are allowed beside hf and s3."""
        self._cache = cache
        self._max_bytes = limits(max_weights_bytes)
        self._timeout_s = timeout_s
        self._schemes = {*BUILT_IN_SCHEMES, *schemes}
        self._room = BoundedSemaphore(MAX_AT_ONCE)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """As the settings bound it."""
        root = settings.adapter_cache or default_cache("adapters")
        return cls(
            cache=AdapterCache(root, settings.adapter_cache_bytes),
            max_weights_bytes=settings.max_fetch_bytes,
            timeout_s=settings.fetch_timeout_s,
            schemes=settings.adapter_scheme,
        )

    def fetch(self, location: RemoteAdapter) -> Fetched:
        """The adapter's files, here. Raises NotFound, AdapterError, SourceUnavailable."""
        if location.scheme not in self._schemes:
            raise AdapterError(
                f"{location}: adapters are not fetched by {location.scheme}://; adapter_scheme can"
                " allow it"
            )
        meter = Meter(str(location), sum(self._max_bytes.values()), self._timeout_s)
        future: Future[Fetched] = Future()

        def body() -> None:
            try:
                with self._room:
                    meter.add(0)  # it may have waited for too long already
                    future.set_result(self._fetch(location, meter))
            except BaseException as error:  # noqa: BLE001 -- it is raised where the result is asked for
                future.set_exception(error)

        Thread(target=body, name="fathom-fetch", daemon=True).start()
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            meter.give_up()
            raise meter.overdue() from None

    def _fetch(self, location: RemoteAdapter, meter: Meter) -> Fetched:
        if location.scheme == "hf":
            from server.sources import hub

            return hub.fetch(location, self._max_bytes, meter)
        from server.sources import object_store

        return object_store.fetch(location, self._max_bytes, meter, self._cache)


def local_path(location: Path | RemoteAdapter, settings: Settings) -> Path:
    """The directory that a command reads: the adapter's own, or where it was fetched to."""
    if isinstance(location, Path):
        return location
    return Fetcher.from_settings(settings).fetch(location).path
