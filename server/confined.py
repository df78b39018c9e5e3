"""Files below a directory, opened so that nothing leads out of it.

Whoever holds the admin key names paths, and must not reach the rest of the disk through them: no
`..`, no link that leads out, no pipe or device, and no link that is put in place between the check
and the opening. Knows adapters as little as samples. Raises `PathRefused`, which says why.
"""

import io
import os
import stat
from pathlib import Path

MAX_PATH_CHARS = 4096
MAX_NAME_CHARS = 256

_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class PathRefused(ValueError):
    """A path that is not followed; the message is a sentence's end, about the path."""


def check_spelling(path: str) -> None:
    """Refuse what no honest path holds, before any of it is looked for."""
    if not path or len(path) > MAX_PATH_CHARS:
        raise PathRefused(f"has {len(path)} characters; it must have 1 to {MAX_PATH_CHARS}")
    if not path.isprintable() or "\\" in path:
        raise PathRefused("holds a control character or a backslash")
    if ".." in path.split("/"):
        raise PathRefused("holds '..'")


def is_plain_name(name: str) -> bool:
    """Whether this can be the name of a directory right below a root."""
    return (
        0 < len(name) <= MAX_NAME_CHARS
        and name.isprintable()
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
    )


def locate(root: Path, path: Path) -> Path:
    """Where `path`, relative to `root` or absolute, really lies, which is below `root`.

    It need not exist. What is found may be another thing by the time it is opened: `open_file`
    looks again.
    """
    real_root = Path(os.path.realpath(root))
    try:
        real = Path(os.path.realpath(real_root / path))
    except (OSError, ValueError) as error:  # a name that the disk has no room for, a NUL
        raise PathRefused(f"cannot be looked up: {error}") from error
    if not real.is_relative_to(real_root):
        raise PathRefused("leads out of the root")
    return real


def open_file(root: Path, path: Path) -> tuple[io.BufferedReader, int]:
    """The regular file that `path` means, open for reading, and its size.

    Links are followed once, to where the file really lies below `root`. The way there is then
    walked without following any: a part of it that has become a link since is not entered.
    Raises PathRefused, and FileNotFoundError.
    """
    real = locate(root, path)
    real_root = Path(os.path.realpath(root))
    parts = real.relative_to(real_root).parts
    if not parts:
        raise PathRefused("is not a regular file")
    try:
        folder = os.open(real_root, _DIRECTORY)
        try:
            for part in parts[:-1]:
                outer, folder = folder, os.open(part, _DIRECTORY, dir_fd=folder)
                os.close(outer)
            # Not opened to find out: on some devices opening alone does something.
            mode = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise PathRefused("cannot be opened: it leads to itself, or has just become a link")
            if not stat.S_ISREG(mode):
                raise PathRefused("is not a regular file")
            descriptor = os.open(parts[-1], _FILE, dir_fd=folder)
        finally:
            os.close(folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PathRefused(f"cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PathRefused("is not a regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def read_file(root: Path, path: Path, max_bytes: int) -> bytes:
    """All of a file. Raises as `open_file`, and PathRefused for one of more than `max_bytes`."""
    file, _ = open_file(root, path)
    with file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise PathRefused(f"cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise PathRefused(f"is over the limit of {max_bytes} bytes")
    return content
