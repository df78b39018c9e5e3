"""A relative path from a client -> a file below the one directory that clients may name files in.

Whoever holds the admin key must not read the rest of the disk through an error message: neither by a
path that leads out, nor by a link that does, nor by one that is put in place meanwhile.
"""

from pathlib import Path, PurePosixPath

from boundary.dataset import MAX_FILE_BYTES
from server import confined
from server.errors import BadRequest


def read(root: Path | None, name: str) -> bytes:
    """All of the file that `name` means. Raises BadRequest, which names the field and says why."""
    if root is None:
        raise _refused("files cannot be named, as the server has no --data-root; send 'samples'")
    path = PurePosixPath(name)
    try:
        confined.check_spelling(name)
        if path.is_absolute():
            raise confined.PathRefused("is absolute")
    except confined.PathRefused as error:
        raise _refused(
            f"must be a relative path below the data root, without '..': {name!r} {error}"
        ) from None
    try:
        return confined.read_file(root, Path(name), MAX_FILE_BYTES)
    except FileNotFoundError:
        raise _refused(f"there is no file {name!r} below the data root") from None
    except confined.PathRefused as error:
        raise _refused(f"{name!r} {error}") from None


def _refused(why: str) -> BadRequest:
    return BadRequest(f"'dataset.file': {why}", param="dataset.file", code="bad_data_path")
