"""Every key that this process knows, and whose a text is.

Three sources: the two flags, the keys file, and the database. File and database are looked at twice
a second, so that a key that is made or revoked anywhere counts here within a second; one that is
changed through this process counts at once. While a source cannot be read, what was last read stays.

A text that is no flag's key costs one scrypt the first time it is seen, whether its id is unknown,
its secret wrong or its key revoked. After that the answer is found by the text's keyed digest, whose
key lives in this process only. They are hashed one after the other and few more wait, so that somebody
who sends wrong keys takes neither the machine nor the place of those already known.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import structlog

from boundary.store.store import StoreError
from server.access import key_file, secret
from server.access.hashed_key import HashedKey
from server.access.key import Grant, Key, Scope
from server.access.key_file import KeyFileError
from server.access.key_store import KeyStore
from server.config import ConfigError, Settings, flag
from server.errors import QueueFull
from server.following import Trouble, follow

log = structlog.get_logger(__name__)

POLL_S = 0.5
MAX_HASHING = 32
"""Texts that are hashed, one after the other, or wait for it at most: 1.5 s of a slow core."""
MAX_WRONG = 10_000
"""Wrong texts that are remembered; then they are forgotten together."""


class Keyring:
    """The keys of one server. Made before its event loop runs, used on it alone."""

    def __init__(self, settings: Settings) -> None:
        """Reads the keys file. Raises ConfigError."""
        self._digest_key = secrets.token_bytes(32)
        self._flags: list[tuple[bytes, Key]] = []
        for scope, given in (("api", settings.api_key), ("admin", settings.admin_key)):
            if given is not None:
                key = Key(f"{scope}-key", f"--{scope}-key", _scope(scope), Grant(), "flag")
                self._flags.append((self._digest(given.get_secret_value()), key))
        self._path: Path | None = settings.keys_file
        self._signature: tuple[int, ...] | None = None
        self._store: KeyStore | None = None
        self._sequence = 0
        self._in_file: Mapping[str, HashedKey] = {}
        self._in_database: dict[str, HashedKey] = {}
        self._by_id: dict[str, HashedKey] = {}
        self._generation = 0
        """Of `_by_id`."""
        self._known: dict[bytes, str | None] = {}
        """Digest of a text -> the hash that it was found to have; None: it opens nothing."""
        self._hashing: dict[bytes, asyncio.Task[str | None]] = {}
        self._hash_turn = asyncio.Lock()
        self._in_turn = asyncio.Lock()
        self._file_trouble, self.database_trouble = (
            Trouble(log, "keys stay as they were last read", "keys are read again", source=source)
            for source in ("file", "database")
        )
        self.is_api_open = False
        """Whether /v1 needs no key: nobody ever made one for it.

        A key that was revoked has been made, and a keys file asks for keys though it is empty.
        """
        self.has_admin = False
        """Whether there is an admin key that was not revoked."""
        if self._path is not None:
            self._signature = key_file.signature(self._path)
            try:
                self._in_file = key_file.read(self._path)
            except KeyFileError as error:
                raise ConfigError(f"{flag('keys_file')}: {error}") from error
        self._merge()

    def listed(self) -> list[Key | HashedKey]:
        """All of them: the flags', then by the time they were made, also those revoked."""
        made = sorted(self._by_id.values(), key=lambda each: (each.created_at, each.key.id))
        return [*(key for _, key in self._flags), *made]

    def is_elsewhere(self, id: str) -> bool:
        """Whether a key of this id is known and not the database's to revoke."""
        in_database = id in self._in_database
        return not in_database and any(key.id == id for key in self._keys())

    async def identify(self, text: str, scope: Scope) -> Key | None:
        """Whose key a text is; where it is that of two, the one with this scope.

        Raises QueueFull while too many texts that nobody knows are being hashed.
        """
        digest = self._digest(text)
        found: Key | None = None
        for each, key in self._flags:
            is_this = hmac.compare_digest(each, digest)
            if is_this and (found is None or key.scope == scope):
                found = key
        if found is not None or not self._by_id:
            return found
        id = secret.id_of(text) or ""
        hash = await self._hash_of(text, digest, id)
        held = self._by_id.get(id)  # as it is now
        is_held = held is not None and held.hash == hash and held.revoked_at is None
        return held.key if is_held and held is not None else None

    async def attach(self, store: KeyStore) -> None:
        """Take the database's keys in too. Raises StoreError."""
        self._store, self._sequence = store, 0
        self._in_database = {}
        await self._refresh_database(store)

    async def refresh(self) -> None:
        """Take over what changed in file and database; a source that fails stays as it was read."""
        async with self._in_turn:
            if self._path is not None:
                self._refresh_file(self._path)
            if self._store is not None:
                try:
                    await self._refresh_database(self._store)
                except StoreError as error:
                    self.database_trouble.begins(str(error))
                else:
                    self.database_trouble.ends()

    async def follow(self, stop: asyncio.Event) -> None:
        """Refresh until told to stop."""
        await follow(self.refresh, stop, POLL_S, log, "keys stay as they are")

    def _keys(self) -> Iterable[Key]:
        yield from (key for _, key in self._flags)
        yield from (each.key for each in self._by_id.values())

    def _digest(self, text: str) -> bytes:
        content = text.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, key=self._digest_key, digest_size=32).digest()

    async def _hash_of(self, text: str, digest: bytes, id: str) -> str | None:
        """The hash that is held under an id, if the text has it."""
        held = self._by_id.get(id)
        known = self._known.get(digest)
        is_stale = known is not None and (held is None or held.hash != known)
        if digest in self._known and not is_stale:
            return known
        task = self._hashing.get(digest)
        if task is None:
            if len(self._hashing) >= MAX_HASHING:
                raise QueueFull("too many keys that are not known yet are being checked")
            task = asyncio.create_task(self._match(text, digest, id))
            self._hashing[digest] = task
            task.add_done_callback(lambda _: self._hashing.pop(digest, None))
        return await asyncio.shield(task)  # others may wait for the same

    async def _match(self, text: str, digest: bytes, id: str) -> str | None:
        async with self._hash_turn:
            # Looked up together: what is found about old keys must not be kept for new ones.
            held, generation = self._by_id.get(id), self._generation
            hash = secret.DECOY if held is None else held.hash
            is_match = await secret.aside(secret.matches, text, hash)
        found = hash if is_match and held is not None else None
        if generation == self._generation:
            if found is None and len(self._known) >= MAX_WRONG + len(self._by_id):
                self._forget_wrong()
            self._known[digest] = found
        return found

    def _refresh_file(self, path: Path) -> None:
        signature = key_file.signature(path)
        if signature == self._signature and signature is not None:
            return
        try:
            self._in_file = key_file.read(path)
        except KeyFileError as error:
            self._file_trouble.begins(str(error))
        else:
            self._file_trouble.ends()
            self._signature = signature
            self._merge()

    async def _refresh_database(self, store: KeyStore) -> None:
        changed, self._sequence = await store.changed_since(self._sequence)
        if changed:
            self._in_database |= {each.key.id: each for each in changed}
            self._merge()

    def _merge(self) -> None:
        self._by_id = self._in_database | dict(self._in_file)
        self._generation += 1
        self._forget_wrong()
        self.is_api_open = self._path is None and all(key.scope != "api" for key in self._keys())
        self.has_admin = any(key.scope == "admin" for _, key in self._flags) or any(
            each.key.scope == "admin" and each.revoked_at is None for each in self._by_id.values()
        )

    def _forget_wrong(self) -> None:
        """What opened nothing may open something now, and a hash that is gone says nothing more."""
        hashes = {each.hash for each in self._by_id.values()}
        self._known = {digest: hash for digest, hash in self._known.items() if hash in hashes}


def _scope(word: str) -> Scope:
    return "admin" if word == "admin" else "api"
