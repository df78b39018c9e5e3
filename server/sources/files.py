"""The three files that an adapter may consist of, and how large each may be.

Nothing else is ever fetched: no list of a repository's files is read, so none can name a file that
lies elsewhere, and no pickle or program comes along.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from boundary import record
from boundary.checkpoint_files import CONFIG_NAME, MAX_CONFIG_BYTES, PICKLE_REFUSED, WEIGHTS_NAME
from server.errors import AdapterError, NotFound
from server.sources.location import RemoteAdapter

REQUIRED = (CONFIG_NAME, WEIGHTS_NAME)
OPTIONAL = (record.FILE_NAME,)
NAMES = (*REQUIRED, *OPTIONAL)


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter that lies here now.

    location: where it is from; on the hub with the commit that its revision was.
    path: its directory. root: the directory that no file of it may lie outside of.
    """

    location: RemoteAdapter
    path: Path
    root: Path


def limits(max_weights_bytes: int) -> dict[str, int]:
    """How large each file may be, in bytes."""
    return {
        CONFIG_NAME: MAX_CONFIG_BYTES,
        WEIGHTS_NAME: max_weights_bytes,
        record.FILE_NAME: record.MAX_FILE_BYTES,
    }


def check_sizes(
    location: RemoteAdapter, sizes: Mapping[str, int | None], max_bytes: Mapping[str, int]
) -> int:
    """All bytes together, before any of them comes. Raises AdapterError for a file over its limit."""
    for name, size in sizes.items():
        if size is None:
            raise AdapterError(
                f"{location}: how large {name} is was not said, so it is not fetched"
            )
        if not 0 <= size <= max_bytes[name]:
            limit = "max_fetch_bytes" if name == WEIGHTS_NAME else "the limit"
            raise AdapterError(
                f"{location}: {name} has {size} bytes, over {limit}, {max_bytes[name]}"
            )
    return sum(size or 0 for size in sizes.values())


def check_complete(location: RemoteAdapter, found: Iterator[str], *, has_pickle: bool) -> None:
    """Raise NotFound where a file is missing, AdapterError where its weights are a pickle."""
    names = set(found)
    if WEIGHTS_NAME not in names and has_pickle:
        raise AdapterError(f"{location}: {PICKLE_REFUSED}")
    for name in REQUIRED:
        if name not in names:
            raise NotFound(f"no adapter at {location}: {name} is missing", param="lora_path")
