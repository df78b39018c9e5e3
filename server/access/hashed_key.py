"""A key as files and databases keep it: everything but its secret."""

from dataclasses import dataclass
from datetime import datetime

from server.access import secret
from server.access.key import Key, NewKey, Source


class NoSuchKey(Exception):
    """There is no key with this id."""

    def __init__(self, id: str) -> None:
        super().__init__(f"there is no key {id!r}")


@dataclass(frozen=True, slots=True)
class HashedKey:
    """One key that was made, revoked or not."""

    key: Key
    hash: str
    created_at: datetime
    revoked_at: datetime | None

    @classmethod
    def make(cls, new: NewKey, source: Source, now: datetime) -> tuple["HashedKey", str]:
        """A new key, and its text, which nobody can tell again."""
        id = secret.make_id()
        text = secret.make_text(id)
        key = Key(id, new.name, new.scope, new.grant, source)
        return cls(key, secret.hashed(text), now, None), text
