"""Where an adapter lies: a directory here, or a name that something else must be asked for.

    hf://ORG/NAME[@REVISION][/FOLDER...]     a '/' in a revision is written %2F
    s3://BUCKET/PREFIX...                    so with every other scheme that fsspec knows

Spelled so that two names of one place are equal as text, and no part of a name can mean a
directory above it, a credential or a query. Knows no network; read by settings, routes and commands.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MAX_CHARS = 2048
BUILT_IN_SCHEMES = ("hf", "s3")

_REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# The hub's own rule; a name cannot begin or end with the marks, or hold `..`.
_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,254}[A-Za-z0-9_-])?")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]{0,253}[A-Za-z0-9])?")
_NEVER_IN_A_PART = set('\\?#%*[]{}|<>"^`')


class LocationError(ValueError):
    """Text that names no place; the message is a sentence's end, about the text."""


@dataclass(frozen=True, slots=True)
class RemoteAdapter:
    """A folder elsewhere, by name. `str` of it is its one spelling.

    root: ORG/NAME on the hub, the bucket elsewhere.
    revision: branch, tag or commit, on the hub alone; None is its main branch.
    folder: below the root, "" for the root itself.
    """

    scheme: str
    root: str
    folder: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision is None else "@" + self.revision.replace("/", "%2F")
        return f"{self.scheme}://{self.root}{at}" + (f"/{self.folder}" if self.folder else "")

    @property
    def name(self) -> str:
        """What it is called where nobody says otherwise: as a directory here, its last part."""
        return (self.folder or self.root).rsplit("/", 1)[-1]

    def is_below(self, prefix: str) -> bool:
        """Whether it lies at or below what `checked_prefix` returned, by whole parts of the name.

        A prefix that names a repository without a revision covers all of its revisions.
        """
        scheme, _, rest = prefix.partition("://")
        given = rest.split("/") if rest else []
        parts = [*self.root.split("/"), *(self.folder.split("/") if self.folder else [])]
        if self.scheme == "hf" and len(given) > 1:
            given[1], _, revision = given[1].partition("@")
            if revision and revision.replace("%2F", "/") != self.revision:
                return False
        return self.scheme == scheme and parts[: len(given)] == given


def parse(text: str) -> Path | RemoteAdapter:
    """A directory, or a place elsewhere where the text begins with a scheme. Raises LocationError."""
    match = _REMOTE.fullmatch(text)
    if match is None and "://" in text:
        raise LocationError("is neither a path nor one place by its scheme")
    if match is None:
        return Path(text)
    if len(text) > MAX_CHARS:
        raise LocationError(f"has {len(text)} characters; at most {MAX_CHARS} are allowed")
    scheme, rest = match[1], match[2]
    _check_scheme(scheme)
    parts = _parts(rest)
    return _on_the_hub(parts) if scheme == "hf" else _in_a_bucket(scheme, parts)


def checked_prefix(text: str) -> str:
    """A prefix of places, `hf://ORG`, `s3://BUCKET/PREFIX` or a whole name, in its one spelling.

    Raises LocationError, also for a scheme alone, which would be everything there is.
    """
    match = _REMOTE.fullmatch(text)
    if match is None:
        raise LocationError("should begin with a scheme, such as hf:// or s3://")
    if match[1] == "hf" and "/" not in match[2].rstrip("/"):
        if not _HUB_NAME.fullmatch(match[2].rstrip("/")):
            raise LocationError("should name an organisation or a user, such as hf://my-org")
        return f"hf://{match[2].rstrip('/')}"
    return str(parse(text))


def checked_scheme(scheme: str) -> str:
    """A scheme that fsspec may be asked for. Raises LocationError."""
    _check_scheme(scheme)
    if scheme in BUILT_IN_SCHEMES:
        raise LocationError("is known already")
    return scheme


def allowed(location: RemoteAdapter, prefixes: Iterable[str]) -> bool:
    """Whether it lies below one of them."""
    return any(location.is_below(prefix) for prefix in prefixes)


def _check_scheme(scheme: str) -> None:
    if scheme != scheme.lower():
        raise LocationError(f"should spell its scheme {scheme.lower()}://")
    if scheme in ("file", "local"):
        raise LocationError("should be a path, without a scheme, where it lies on this machine")


def _parts(rest: str) -> list[str]:
    if not rest.isprintable():
        raise LocationError("holds a control character")
    parts = rest.removesuffix("/").split("/")
    for part in parts:
        if part in ("", ".", ".."):
            raise LocationError(f"holds the part {part!r}, which names nothing")
        if "::" in part:
            raise LocationError("holds '::', and places are not chained")
    return parts


def _check_folder(parts: list[str]) -> None:
    for part in parts:
        if found := _NEVER_IN_A_PART & set(part):
            raise LocationError(f"holds {min(found)!r} in its folder")


def _on_the_hub(parts: list[str]) -> RemoteAdapter:
    if len(parts) < 2:
        raise LocationError("should be hf://ORG/NAME, with @REVISION and a /FOLDER where needed")
    organisation, (name, at, revision), folder = parts[0], parts[1].partition("@"), parts[2:]
    for part in (organisation, name):
        if not _HUB_NAME.fullmatch(part) or ".." in part or "--" in part:
            # Its text may be somebody's token, and is not repeated; so below.
            raise LocationError("holds a name of an organisation or repository that cannot be one")
    revision = revision.replace("%2F", "/").replace("%2f", "/")
    is_sound = _REVISION.fullmatch(revision) and not {"", ".", ".."} & set(revision.split("/"))
    if at and not (is_sound and ".." not in revision):
        raise LocationError(f"holds {revision[:100]!r}, which cannot be a revision")
    _check_folder(folder)
    return RemoteAdapter("hf", f"{organisation}/{name}", "/".join(folder), revision or None)


def _in_a_bucket(scheme: str, parts: list[str]) -> RemoteAdapter:
    if not _HOST.fullmatch(parts[0]):
        raise LocationError(
            f"should be {scheme}://BUCKET/PREFIX, with credentials by the environment"
        )
    _check_folder(parts[1:])
    return RemoteAdapter(scheme, parts[0], "/".join(parts[1:]))
