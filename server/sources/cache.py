"""Adapters of object stores on this disk: each whole or not there, the least recently used go first.

One directory an adapter's content, named by a digest of where it is from and what the store said of
its files. It is filled under another name and renamed, so that several servers may share a cache.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INCOMING = ".incoming-"
ABANDONED_S = 24 * 3600.0
"""No fetch lasts so long: what is older was left by a process that was killed."""


class AdapterCache:
    """Directories below `root`, of `max_bytes` together; the one just kept may be larger alone."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes

    def find(self, key: str) -> Path | None:
        """The directory of this content, now the most recently used."""
        path = self._root / key
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """An empty directory that is gone afterwards, unless `keep` took it. Raises OSError."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._root / f"{INCOMING}{uuid.uuid4().hex}"
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def keep(self, incoming: Path, key: str) -> Path:
        """Give a filled directory its name, and make room. Raises OSError."""
        path = self._root / key
        try:
            os.rename(incoming, path)
        except OSError:
            if not path.is_dir():
                raise
            os.utime(path)  # another thread or process was faster, with the same content
        self._make_room(path)
        return path

    def _make_room(self, newest: Path) -> None:
        used = [(found.stat().st_mtime, found, _num_bytes(found)) for found in self._folders()]
        excess = sum(num_bytes for _, _, num_bytes in used) - self._max_bytes
        for changed_s, found, num_bytes in sorted(used, key=lambda each: each[:2]):
            is_partial = found.name.startswith(INCOMING)
            is_abandoned = is_partial and changed_s < time.time() - ABANDONED_S
            if is_abandoned or (excess > 0 and not is_partial and found != newest):
                shutil.rmtree(found, ignore_errors=True)
                excess -= num_bytes

    def _folders(self) -> Iterator[Path]:
        for found in self._root.iterdir():
            with suppress(FileNotFoundError):
                if found.is_dir() and not found.is_symlink():
                    yield found


def _num_bytes(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            total += file.lstat().st_size
    return total
