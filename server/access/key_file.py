"""The keys file: hashed keys as JSON, written by `fathom keys`, read by servers whenever it changes.

A file is replaced whole, so that a reader sees the old or the new one. Whoever writes holds
`FILE.new`, which is made only where it is not: two writers never lose each other's key.
"""

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.access import secret
from server.access.hashed_key import HashedKey, NoSuchKey
from server.access.key import Key, NewKey, problem

MAX_BYTES = 64 << 20


class KeyFileError(Exception):
    """A keys file that cannot be used, in one line that shows nothing of what it holds."""


class _Entry(NewKey):
    """One key of the file."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    hash: str
    created_at: AwareDatetime
    revoked_at: AwareDatetime | None = None

    @field_validator("hash")
    @classmethod
    def _hash_is_ours(cls, value: str) -> str:
        if not secret.is_hash(value):
            raise ValueError(f"should be a scrypt hash with ln={secret.LOG2_N}, whole")
        return value


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: list[_Entry]

    @field_validator("keys")
    @classmethod
    def _ids_differ(cls, value: list[_Entry]) -> list[_Entry]:
        if len({entry.id for entry in value}) != len(value):
            raise ValueError("holds an id twice")
        return value


def read(path: Path) -> dict[str, HashedKey]:
    """The keys by id. Raises KeyFileError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise KeyFileError(f"{path}: is larger than {MAX_BYTES} bytes")
        file = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        place, words = problem(error)
        raise KeyFileError(f"{path}: {place}: {words}" if place else f"{path}: {words}") from None
    return {
        entry.id: HashedKey(
            Key(entry.id, entry.name, entry.scope, entry.grant, "file"),
            entry.hash,
            entry.created_at,
            entry.revoked_at,
        )
        for entry in file.keys
    }


def signature(path: Path) -> tuple[int, ...] | None:
    """What differs after a file was replaced or written; None where there is none to be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def add(path: Path, new: NewKey) -> tuple[HashedKey, str]:
    """Make a key and keep it in the file, which is made if it is missing. Raises KeyFileError."""
    with _Writing(path) as writing:
        keys = read(path) if path.exists() else {}
        made, text = HashedKey.make(new, "file", datetime.now(UTC))
        writing.replace(keys | {made.key.id: made})
    return made, text


def revoke(path: Path, id: str) -> HashedKey:
    """Mark a key as revoked; one that is stays as it is. Raises KeyFileError and NoSuchKey."""
    with _Writing(path) as writing:
        keys = read(path)
        if id not in keys:
            raise NoSuchKey(id)
        found = keys[id]
        if found.revoked_at is None:
            found = replace(found, revoked_at=datetime.now(UTC))
            writing.replace(keys | {id: found})
    return found


class _Writing:
    """Alone in writing a file for as long as the block lasts."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._new = self._path.with_name(self._path.name + ".new")

    def __enter__(self) -> "_Writing":
        try:
            self._descriptor = os.open(self._new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            raise KeyFileError(
                f"{self._new}: exists: another `fathom keys` is writing, or one was killed; "
                "if none is, remove it"
            ) from None
        except OSError as error:
            raise KeyFileError(f"{self._path}: cannot be written: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._new.unlink(missing_ok=True)

    def replace(self, keys: dict[str, HashedKey]) -> None:
        """Put these keys in the file's place. Raises KeyFileError; then the old file stays."""
        file = _File(keys=[_entry(each) for each in keys.values()])
        content = file.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"
        try:
            with open(self._descriptor, "wb", closefd=False) as stream:
                stream.write(content)
            os.fsync(self._descriptor)
            os.replace(self._new, self._path)
        except OSError as error:
            raise KeyFileError(f"{self._path}: cannot be written: {error.strerror}") from None


def _entry(each: HashedKey) -> _Entry:
    return _Entry(
        id=each.key.id,
        name=each.key.name,
        scope=each.key.scope,
        grant=each.key.grant,
        hash=each.hash,
        created_at=each.created_at,
        revoked_at=each.revoked_at,
    )
