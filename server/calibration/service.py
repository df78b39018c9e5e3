"""Calibration of one server: its store, the depths in force and its jobs, from start to stop.

Made with the application and entered with its lifespan. A server without a database serves all the
same: then a depth comes from `boundary.json` beside an adapter, and there are no jobs.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import structlog

from boundary.store.database import Database
from boundary.store.store import Store, StoreError
from server.calibration.boundaries import Boundaries
from server.calibration.jobs import JobManager
from server.config import Settings
from server.engine.protocol import Engine
from server.environment import default_database
from server.errors import StoreUnavailable
from server.following import Trouble

log = structlog.get_logger(__name__)

Part = TypeVar("Part")


class CalibrationService:
    """What the admin routes and the lifespan share."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._store: Store | None = None
        self._boundaries: Boundaries | None = None
        self._jobs: JobManager | None = None

    @property
    def store(self) -> Store:
        """Raises StoreUnavailable where there is none."""
        return _open(self._store)

    @property
    def boundaries(self) -> Boundaries:
        """Likewise."""
        return _open(self._boundaries)

    @property
    def jobs(self) -> JobManager:
        """Likewise."""
        return _open(self._jobs)

    @property
    def database(self) -> Database | None:
        """The store's, for whoever keeps tables beside it; None where there is none."""
        return None if self._store is None else self._store.database

    @property
    def trouble(self) -> Trouble | None:
        """Of following the store; None where there is none."""
        return None if self._boundaries is None else self._boundaries.trouble

    @property
    def is_open(self) -> bool:
        """Whether there is a store."""
        return self._store is not None

    async def adapter_came(self) -> None:
        """Bring a record that lies beside a new adapter into force now, not at the next look."""
        if self._boundaries is None:
            return
        try:
            await self._boundaries.refresh()
        except StoreError as error:
            log.warning("calibrated depths stay as they are", reason=str(error))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store and follow it for as long as the block lasts; jobs end with it.

        Raises StoreUnavailable if the store cannot be opened.
        """
        store = await open_store(self._settings)
        if store is None:
            yield
            return
        stop = asyncio.Event()
        boundaries = Boundaries(self._engine, store)
        jobs = JobManager(self._engine, store, boundaries)
        tasks: list[asyncio.Task[None]] = []
        try:
            try:
                await boundaries.refresh()  # the first request has the right depth already
            except StoreError as error:
                raise StoreUnavailable(str(error)) from error
            tasks = [asyncio.create_task(work(stop)) for work in (boundaries.follow, jobs.tend)]
            self._store, self._boundaries, self._jobs = store, boundaries, jobs
            yield
        finally:
            self._store = self._boundaries = self._jobs = None
            stop.set()
            await jobs.stop()
            await asyncio.gather(*tasks, return_exceptions=True)
            await store.close()


async def open_store(settings: Settings) -> Store | None:
    """The database of these settings; None where nothing is kept. Raises StoreUnavailable.

    With an admin key or a keys file, and no database named, it is SQLite in the user's state
    directory.
    """
    try:
        if settings.database is not None:
            return await Store.open(settings.database.get_secret_value())
        if settings.admin_key is None and settings.keys_file is None:
            return None
        path = default_database()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return await Store.open(f"sqlite:///{path}")
    except StoreError as error:
        raise StoreUnavailable(f"the database cannot be opened: {error}") from error
    except OSError as error:
        raise StoreUnavailable(
            f"there is no place for a database at {error.filename!r} ({error.strerror}); name one "
            "with --database"
        ) from error


Answer = TypeVar("Answer")


def check_store(settings: Settings, ask: Callable[[Database | None], Awaitable[Answer]]) -> Answer:
    """Open the database, ask it and close it: worth knowing before a model is loaded for minutes.

    ask: is given None where there is no database. Raises StoreUnavailable, and what `ask` raises.
    """

    async def check() -> Answer:
        store = await open_store(settings)
        try:
            return await ask(None if store is None else store.database)
        finally:
            if store is not None:
                await store.close()

    return asyncio.run(check())


def _open(part: Part | None) -> Part:
    if part is None:
        raise StoreUnavailable(
            "calibrations are not kept here: the server has no database; start it with --database"
        )
    return part
