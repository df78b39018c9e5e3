"""Where adapters lie: the operator's directories, the adapter root, and sources that they are fetched from.

A client's path is another thing than the operator's: it must lie below the adapter root, and so must every
file that is opened there, whatever links say and however often it is read again. What the operator
named word for word, a client may name too.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from boundary.checkpoint_files import CONFIG_NAME
from server import confined
from server.errors import AdapterError, BadRequest, NotFound
from server.model.tensor_file import shown
from server.sources.fetcher import Fetcher
from server.sources.location import RemoteAdapter, allowed

Location = Path | RemoteAdapter


class Place(NamedTuple):
    """A directory, and the one that no file of it may lie outside of; None: the operator's own.

    source: where it was fetched from, and is again once the directory is gone.
    """

    path: Path
    root: Path | None
    source: RemoteAdapter | None = None

    def __str__(self) -> str:
        return str(self.source or self.path)


Asked = Place | RemoteAdapter
"""A place, or one that is known once it has been fetched."""


class Places:
    """Which places there are, and which of them a client may name. Any thread may ask."""

    def __init__(
        self, root: Path | None, fetcher: Fetcher | None, client_sources: Sequence[str]
    ) -> None:
        """fetcher: brings remote adapters. client_sources: prefixes of those that clients may name."""
        self._root = root.resolve() if root is not None else None
        self._fetcher = fetcher
        self._client_sources = client_sources
        self._operators: set[Location] = set()
        self._lock = Lock()

    def of_operator(self, location: Location) -> Asked:
        """Where the operator says that an adapter lies."""
        with self._lock:
            self._operators.add(_absolute(location))
        return Place(location, None) if isinstance(location, Path) else location

    def of_client(self, location: Location) -> Asked:
        """Where a client says so. Nobody is asked for it before it is allowed.

        Raises BadRequest for a path that leads out of the root, or a source that clients may not name.
        """
        with self._lock:
            is_operators = _absolute(location) in self._operators
        if isinstance(location, RemoteAdapter):
            if not is_operators and not allowed(location, self._client_sources):
                raise _refused(
                    f"adapters cannot be loaded from {shown(str(location))}:"
                    " no --adapter-source allows it"
                )
            return location
        if is_operators:
            return Place(location, None)
        if self._root is None:
            raise _refused("adapters cannot be loaded by path, as the server has no --adapter-root")
        try:
            confined.check_spelling(str(location))
            return Place(confined.locate(self._root, location), self._root)
        except confined.PathRefused as error:
            raise _refused(f"the path {shown(str(location))} {error}") from error

    def below_root(self, name: str) -> Place | None:
        """The adapter root's own adapter of this name, if there is one."""
        if self._root is None or not confined.is_plain_name(name):
            return None
        try:
            path = confined.locate(self._root, Path(name))
        except confined.PathRefused:
            return None
        is_adapter = path != self._root and os.path.lexists(path / CONFIG_NAME)
        return Place(path, self._root) if is_adapter else None

    def here(self, asked: Asked) -> Place:
        """A place whose directory is there, fetched if it must be.

        Raises NotFound where there is none, and AdapterError where nothing can be fetched.
        """
        if isinstance(asked, Place) and os.path.exists(asked.path):
            return asked
        source = asked.source if isinstance(asked, Place) else asked
        if source is None:
            raise NotFound(f"no adapter at {str(asked)!r}", param="lora_path")
        if self._fetcher is None:
            raise AdapterError(f"{source}: nothing is fetched here")
        fetched = self._fetcher.fetch(source)
        return Place(fetched.path, fetched.root, fetched.location)


def _absolute(location: Location) -> Location:
    """As two are compared."""
    return location.absolute() if isinstance(location, Path) else location


def _refused(why: str) -> BadRequest:
    return BadRequest(why, param="lora_path", code="bad_adapter_path")
