"""Files that are the old ones or the new ones, whatever fails meanwhile: a full disk, a crash, a kill."""

import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path


def write(contents: Mapping[Path, bytes]) -> None:
    """Write beside each file, then put all in their places; on the disk when it returns.

    No file is touched before the contents of all are on the disk. Raises OSError, and leaves nothing
    behind, if that fails. A crash between two renames leaves whole files, some of them new.
    """
    with ExitStack() as undo:
        written: dict[Path, Path] = {}
        for path, content in contents.items():
            beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            undo.callback(_forget, beside)
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            written[path] = beside
        for path, beside in written.items():
            os.replace(beside, path)
    for directory in {path.parent for path in contents}:
        _sync_directory(directory)


def _forget(path: Path) -> None:
    with suppress(FileNotFoundError):  # it is in its place
        os.unlink(path)


def _sync_directory(path: Path) -> None:
    """A rename outlives a power cut only once its directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
