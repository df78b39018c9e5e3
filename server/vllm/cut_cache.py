"""Cut adapters on the disk, by content and depth: whole or not there, and no more bytes than allowed.

    CACHE/<digest of config and weights>-<depth>/adapter_config.json, adapter_model.safetensors

vLLM may read a cut again at any time while its name is served, and its engine dies if it cannot. So
who uses a cut holds a shared lock on its directory, which the system gives back when the process ends,
and only what nobody holds is deleted, least recently used first. Several servers may share a cache.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.errors import Overloaded

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DOOR = ".lock"
_UNFINISHED = ".new-"


class Cut:
    """A directory that stays as it is until `release`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """It may be deleted from now on. More than once is once."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class CutCache:
    """Any thread, any number of processes. Every method raises OSError where the disk does."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self.max_bytes = max_bytes
        self._sweep()

    def get(self, key: str) -> Cut | None:
        """The cut of this key, held; it counts as just used."""
        path = self._directory / key
        try:
            descriptor = os.open(path, _DIRECTORY)
        except FileNotFoundError:
            return None
        # One that is deleted at this moment is locked, or is not here under its name any more.
        if not _lock(descriptor, fcntl.LOCK_SH) or not _is_at(path, descriptor):
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return Cut(path, descriptor)

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A directory for something unfinished; on the way out it is gone, with whatever is in it."""
        path = self._directory / f"{_UNFINISHED}{secrets.token_hex(8)}"
        with self._door():  # else a sweep could come between the two
            path.mkdir(mode=0o700)
            descriptor = os.open(path, _DIRECTORY)
            _lock(descriptor, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def put(self, key: str, unfinished: Path) -> Cut:
        """Take the directory in as the cut of this key, unless there is one; held.

        Raises Overloaded if all that is kept is held and there is no room beside it.
        """
        with self._door():
            found = self.get(key)
            if found is not None:
                return found
            self._make_way(_num_bytes(unfinished))
            os.rename(unfinished, self._directory / key)
            _sync(self._directory)
            found = self.get(key)
        assert found is not None  # deleting needs the door
        return found

    def make(self, key: str, write: Callable[[Path], object]) -> Cut:
        """The cut of this key, written to a path that does not exist yet if there is none."""
        found = self.get(key)
        if found is not None:
            return found
        with self.room() as room:
            write(room / "cut")
            return self.put(key, room / "cut")

    def _make_way(self, num_bytes: int) -> None:
        kept = sorted((path.stat().st_mtime_ns, path) for path in self._cuts())
        sizes = {path: _num_bytes(path) for _, path in kept}
        total = sum(sizes.values())
        for _, path in kept:
            if total + num_bytes <= self.max_bytes:
                return
            if self._delete(path):
                total -= sizes[path]
        if total + num_bytes > self.max_bytes:
            raise Overloaded(
                f"the cache of cut adapters is full: {total} bytes are in use, {num_bytes} more are"
                f" needed, and the limit is {self.max_bytes}"
            )

    def _delete(self, path: Path) -> bool:
        """Delete it unless somebody holds it."""
        descriptor = os.open(path, _DIRECTORY)
        try:
            if not _lock(descriptor, fcntl.LOCK_EX):
                return False
            doomed = self._directory / f"{_UNFINISHED}{secrets.token_hex(8)}"
            shutil.rmtree(path.rename(doomed))  # whole or gone, also after a crash
            return True
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """What processes that died left unfinished."""
        with self._door():
            for path in self._directory.glob(f"{_UNFINISHED}*"):
                self._delete(path)

    def _cuts(self) -> Iterator[Path]:
        return (path for path in self._directory.iterdir() if path.name[0] != "." and path.is_dir())

    @contextmanager
    def _door(self) -> Iterator[None]:
        """One at a time adds and deletes, of all processes."""
        descriptor = os.open(self._directory / _DOOR, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, _DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
