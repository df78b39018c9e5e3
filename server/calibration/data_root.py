"""A relative path from a client -> a file below the one directory that clients may name files in.

Whoever holds the admin key must not read the rest of the disk through an error message. The check
follows links: one that leads out is refused like a path that does.
"""

from pathlib import Path, PurePosixPath

from server.errors import BadRequest


def resolve(root: Path | None, name: str) -> Path:
    """The regular file that `name` means. Raises BadRequest, which names the field and says why."""
    if root is None:
        raise _refused("files cannot be named, as the server has no --data-root; send 'samples'")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise _refused(f"must be a relative path below the data root, without '..' (got {name!r})")
    try:
        real_root = root.resolve(strict=True)
        found = (real_root / path).resolve(strict=True)
        is_file = found.is_file()
    except (OSError, RuntimeError, ValueError):  # missing, a loop of links, a NUL
        raise _refused(f"there is no file {name!r} below the data root") from None
    if not found.is_relative_to(real_root):
        raise _refused(f"{name!r} leads out of the data root")
    if not is_file:
        raise _refused(f"{name!r} is not a regular file")
    return found


def _refused(why: str) -> BadRequest:
    return BadRequest(f"'dataset.file': {why}", param="dataset.file", code="bad_data_path")
