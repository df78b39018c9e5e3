"""The directory of adapters: which there are, whether one has changed, and copies of what it holds.

vLLM opens the files of an adapter whenever it likes, by their path. So it is given copies, made once
from files that were opened below the root without following a link out of it: an adapter that is
replaced, half-written or deleted later is another matter than the one that runs.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from boundary import record
from boundary.checkpoint_files import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    PICKLE_REFUSED,
    WEIGHTS_NAME,
    has_only_a_pickle,
)
from server import confined
from server.errors import AdapterError

Signature = tuple[str, tuple[tuple[int, ...] | None, ...]]
"""Where an adapter really lies and what the disk says of its files; another one means that it may have
changed."""

_CHUNK_BYTES = 1 << 20


class AdapterRoot:
    """Every subdirectory with an `adapter_config.json` is an adapter of its name. Any thread."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))

    def is_adapter(self, name: str) -> bool:
        """Whether there is one of this plain name, which does not lie outside."""
        return self.find(name) is not None

    def find(self, name: str) -> Path | None:
        """The adapter's directory, below the root."""
        try:
            path = confined.locate(self._root, Path(name))
        except confined.PathRefused:
            return None
        return path if path != self._root and os.path.lexists(path / CONFIG_NAME) else None

    def signature(self, name: str) -> Signature | None:
        """Of config, weights and record, of which none is opened; None where there is no adapter."""
        adapter = self.find(name)
        return None if adapter is None else _signature(adapter)

    def record(self, adapter: Path) -> bytes | None:
        """The content of the `boundary.json` beside the weights, if there is one.

        Raises PathRefused for one that lies outside of the root, or is too large.
        """
        try:
            return confined.read_file(self._root, adapter / record.FILE_NAME, record.MAX_FILE_BYTES)
        except FileNotFoundError:
            return None

    def copy(self, adapter: Path, out: Path, max_bytes: int) -> str:
        """Copy config and weights into the new directory `out`; returns the digest of both.

        Raises AdapterError where they cannot be copied, also if they change meanwhile, and OSError
        where `out` cannot be written.
        """
        if has_only_a_pickle(adapter):
            raise AdapterError(PICKLE_REFUSED)
        before = _signature(adapter)
        out.mkdir()
        digest = hashlib.sha256()
        for name, limit in ((CONFIG_NAME, MAX_CONFIG_BYTES), (WEIGHTS_NAME, max_bytes)):
            try:
                file, size = confined.open_file(self._root, adapter / name)
            except FileNotFoundError as error:
                raise AdapterError(f"{name} is missing") from error
            except confined.PathRefused as error:
                raise AdapterError(f"{name} {error}") from error
            with file, (out / name).open("xb") as copy:
                if size > limit:
                    raise AdapterError(f"{name}: {size} bytes are over the limit of {limit}")
                digest.update(f"{name} {size} ".encode())
                _copy(file, copy, size, digest, name)
        if _signature(adapter) != before:
            raise AdapterError("its files changed while they were read; ask again")
        return digest.hexdigest()


def _signature(adapter: Path) -> Signature:
    files = (CONFIG_NAME, WEIGHTS_NAME, record.FILE_NAME)
    return str(adapter), tuple(_look(adapter / file) for file in files)


def _look(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _copy(file: BinaryIO, copy: BinaryIO, size: int, digest: "hashlib._Hash", name: str) -> None:
    left = size
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise AdapterError(f"{name} shrank while it was read; ask again")
        digest.update(chunk)
        copy.write(chunk)
        left -= len(chunk)
    copy.flush()
    os.fsync(copy.fileno())
