"""Keys, limits and usage of one server, from its start to its stop.

Made with the application and entered with its lifespan, after the store that it shares. Without a
database keys come from flags and the keys file alone, and no usage is kept.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from boundary.store.database import Database
from boundary.store.store import StoreError
from server.access.key_store import KeyStore
from server.access.keyring import Keyring
from server.access.ledger import Ledger
from server.access.rate_limits import RateLimits
from server.access.usage_store import UsageStore
from server.config import Settings
from server.errors import StoreUnavailable

LAST_END_S = 5.0
"""How long a stopping server waits for requests that were cancelled to be counted."""
_POLL_S = 0.01


class Access:
    """What routes and the lifespan share."""

    def __init__(self, settings: Settings, base: str) -> None:
        """base: the base model's name. Raises ConfigError for a keys file that cannot be used."""
        self.keyring = Keyring(settings)
        self.limits = RateLimits()
        self.ledger = Ledger(base)
        self._key_store: KeyStore | None = None
        self._usage_store: UsageStore | None = None

    @property
    def key_store(self) -> KeyStore:
        """Raises StoreUnavailable where there is none."""
        if self._key_store is None:
            raise StoreUnavailable(
                "keys are not kept here: the server has no database; start it with --database"
            )
        return self._key_store

    @property
    def usage_store(self) -> UsageStore:
        """Likewise."""
        if self._usage_store is None:
            raise StoreUnavailable(
                "usage is not kept here: the server has no database; start it with --database"
            )
        return self._usage_store

    @asynccontextmanager
    async def running(self, database: Database | None) -> AsyncIterator[None]:
        """Follow keys and write usage for as long as the block lasts, and the rest of it at its end.

        Raises StoreUnavailable if the database's tables cannot be had.
        """
        stop = asyncio.Event()
        if database is not None:
            try:
                self._key_store = await KeyStore.open(database)
                self._usage_store = UsageStore(database)
                await self.keyring.attach(self._key_store)
            except StoreError as error:
                raise StoreUnavailable(str(error)) from error
            self.ledger.attach(self._usage_store)
        work = (
            [self.keyring.follow] if database is None else [self.keyring.follow, self.ledger.follow]
        )
        tasks = [asyncio.create_task(each(stop)) for each in work]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._until_counted()
            await self.ledger.close()
            self._key_store = self._usage_store = None

    async def _until_counted(self) -> None:
        """The HTTP server cancels what outlives its patience, and does not wait for that to end."""
        give_up_at = asyncio.get_running_loop().time() + LAST_END_S
        while self.ledger.num_open and asyncio.get_running_loop().time() < give_up_at:
            await asyncio.sleep(_POLL_S)


async def needs_key(settings: Settings, database: Database | None) -> bool:
    """Whether /v1 of a server with these settings asks for a key. Raises StoreUnavailable, ConfigError."""
    keyring = Keyring(settings)
    if database is not None:
        try:
            await keyring.attach(await KeyStore.open(database))
        except StoreError as error:
            raise StoreUnavailable(f"the database cannot be opened: {error}") from error
    return not keyring.is_api_open
