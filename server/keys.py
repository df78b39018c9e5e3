"""`fathom keys`: keys made, listed and revoked, in a keys file or a database.

A new key is all that is printed on standard output, so that it can be piped to where it is kept;
everything else is said on standard error.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from getpass import getuser
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from boundary.store.database import Database
from boundary.store.store import StoreError
from server.access import key_file
from server.access.hashed_key import HashedKey, NoSuchKey
from server.access.key import Grant, NewKey, problem
from server.access.key_file import KeyFileError
from server.access.key_store import KeyStore
from server.config import ConfigError, Settings, flag
from server.errors import FathomError, NotFound, StoreUnavailable

Answer = TypeVar("Answer")


class Place:
    """Where keys are kept: the file or the database that was named, and not both."""

    def __init__(self, settings: Settings) -> None:
        self._file, self._database = settings.keys_file, settings.database
        both = f"{flag('keys_file')} or {flag('database')}"
        if self._file is None and self._database is None:
            raise ConfigError(f"name where the keys are kept: {both}")
        if self._file is not None and self._database is not None:
            raise ConfigError(f"keys are kept in one place: name {both}, not both")

    def add(self, new: NewKey) -> tuple[HashedKey, str]:
        """A new key and its text."""
        file = self._file
        if file is not None:
            return _of_file(lambda: key_file.add(file, new))
        return self._ask(lambda store: store.create(new, _actor()))

    def revoke(self, id: str) -> HashedKey:
        """A key that opens nothing any more."""
        file = self._file
        if file is not None:
            return _of_file(lambda: key_file.revoke(file, id))
        return self._ask(lambda store: store.revoke(id, _actor()))

    def keys(self) -> Sequence[HashedKey]:
        """All keys, the oldest first."""
        file = self._file
        if file is not None:
            found = [*_of_file(lambda: key_file.read(file)).values()]
        else:
            found = [*self._ask(lambda store: store.changed_since(0))[0]]
        return sorted(found, key=lambda each: (each.created_at, each.key.id))

    def __str__(self) -> str:
        return "the database" if self._file is None else str(self._file)

    def _ask(self, ask: Callable[[KeyStore], Awaitable[Answer]]) -> Answer:
        assert self._database is not None
        url = self._database.get_secret_value()

        async def run() -> Answer:
            database = await Database.open(url)
            try:
                return await ask(await KeyStore.open(database))
            finally:
                await database.close()

        try:
            return asyncio.run(run())
        except StoreError as error:
            raise StoreUnavailable(str(error)) from error
        except NoSuchKey as error:
            raise NotFound(str(error)) from error


def add(
    settings: Settings,
    name: str,
    *,
    is_admin: bool,
    adapters: Sequence[str],
    limits: dict[str, int | None],
    as_json: bool,
) -> int:
    """Make a key, and show it this once."""
    place = Place(settings)
    try:
        given = {"adapters": tuple(adapters) or None, **limits}
        grant = Grant(**given)  # type: ignore[arg-type]
        new = NewKey(name=name, scope="admin" if is_admin else "api", grant=grant)
    except ValidationError as error:
        field, words = problem(error)
        where = field.partition(".")[0] or "admin"
        spelled = "NAME" if where == "name" else flag(where)
        raise ConfigError(f"{spelled}: {words[0].lower()}{words[1:]}") from None
    made, text = place.add(new)
    if as_json:
        sys.stdout.write(json.dumps({"key": text} | described(made)) + "\n")
    else:
        sys.stdout.write(text + "\n")
        sys.stderr.write(
            f"key {made.key.id} ({name!r}) is in {place}, hashed; it is shown this once\n"
        )
    return 0


def show(settings: Settings, *, as_json: bool) -> int:
    """List the keys, without what opens anything."""
    keys = Place(settings).keys()
    if as_json:
        sys.stdout.write(json.dumps([described(each) for each in keys], indent=2) + "\n")
        return 0
    table = Table("id", "name", "scope", "limits", "made", "revoked", box=None, pad_edge=False)
    for each in keys:
        limits = each.key.grant.described()
        table.add_row(
            each.key.id,
            each.key.name,
            each.key.scope,
            ", ".join(f"{name} {_words(value)}" for name, value in limits.items()),
            f"{each.created_at:%Y-%m-%d %H:%M}",
            "" if each.revoked_at is None else f"{each.revoked_at:%Y-%m-%d %H:%M}",
        )
    Console(markup=False, highlight=False).print(table)
    return 0


def revoke(settings: Settings, ids: Sequence[str]) -> int:
    """Let keys open nothing any more, in running servers within two seconds."""
    place = Place(settings)
    for id in ids:
        revoked = place.revoke(id)
        sys.stderr.write(f"key {id} ({revoked.key.name!r}) is revoked\n")
    return 0


def described(each: HashedKey) -> dict[str, Any]:
    """A key as JSON, without its hash."""
    return {
        "id": each.key.id,
        "name": each.key.name,
        "scope": each.key.scope,
        **each.key.grant.described(),
        "created_at": each.created_at.isoformat(),
        "revoked_at": each.revoked_at and each.revoked_at.isoformat(),
    }


def _of_file(work: Callable[[], Answer]) -> Answer:
    try:
        return work()
    except KeyFileError as error:
        raise FathomError(str(error)) from error
    except NoSuchKey as error:
        raise NotFound(str(error)) from error


def _actor() -> str:
    """How the audit trail calls whoever runs this command."""
    return f"fathom keys:{getuser()}"


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
