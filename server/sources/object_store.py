"""Adapters in S3 and whatever else fsspec knows, kept in a cache of this server's own.

Credentials, endpoints and regions are the environment's, as each library reads them (`AWS_*`,
`FSSPEC_S3_*`). What the store says of the files is looked at before they come and again afterwards:
an adapter that is being overwritten is not fetched half old and half new.

Errors are told in own words: a store's may repeat what was signed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import structlog

from boundary.checkpoint_files import PICKLE_NAME
from server.errors import AdapterError, FathomError, NotFound, SourceUnavailable
from server.sources.cache import AdapterCache
from server.sources.files import NAMES, REQUIRED, Fetched, check_complete, check_sizes
from server.sources.location import BUILT_IN_SCHEMES, RemoteAdapter
from server.sources.meter import Meter

log = structlog.get_logger(__name__)

PIECE_BYTES = 1 << 20
BLOCK_BYTES = 8 << 20
"""Asked for at a time, so that a large file is not one request for each piece."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 30,
            "retries": {"max_attempts": 3, "mode": "standard"},
        }
    }
}

Info = Mapping[str, Any]


def fetch(
    location: RemoteAdapter, max_bytes: Mapping[str, int], meter: Meter, cache: AdapterCache
) -> Fetched:
    """The adapter's files in the cache, as they lie in the store now.

    Raises NotFound, AdapterError, and SourceUnavailable where the store cannot be reached.
    """
    with _in_own_words(location):
        # The same instance every time: making one of s3fs's takes a second of one core.
        options = OPTIONS.get(location.scheme, {})
        store = fsspec.filesystem(location.scheme, use_listings_cache=False, **options)
        found = _look(store, location)
        meter.expect(check_sizes(location, {n: _size(i) for n, i in found.items()}, max_bytes))
        key = _key(location, found)
        kept = cache.find(key)
        if kept is None:
            with cache.incoming() as folder:
                for name, info in found.items():
                    _copy(store, location, name, folder / name, _size(info), meter)
                if _key(location, _look(store, location)) != key:
                    raise SourceUnavailable(f"{location}: changed while it was fetched; ask again")
                kept = cache.keep(folder, key)
    return Fetched(location, kept, kept)


def _look(store: Any, location: RemoteAdapter) -> dict[str, Info]:
    """What the store says of each file that is there."""
    found = {name: info for name in NAMES if (info := _info(store, location, name)) is not None}
    has_pickle = len(found) < 2 and _info(store, location, PICKLE_NAME) is not None
    check_complete(location, iter(found), has_pickle=has_pickle)
    return found


def _info(store: Any, location: RemoteAdapter, name: str) -> Info | None:
    try:
        info: Info = store.info(f"{location}/{name}")
    except FileNotFoundError:
        return None
    except PermissionError:
        if name in REQUIRED:
            raise
        # S3 says so of a file that is not there to whoever may not list the bucket.
        log.warning("may not be read, or is not there", location=str(location), file=name)
        return None
    return info if info.get("type") == "file" else None


def _size(info: Info) -> int | None:
    size = info.get("size")
    return size if isinstance(size, int) else None


def _key(location: RemoteAdapter, found: Mapping[str, Info]) -> str:
    """Another one whenever the store says that a file has changed: its ETag, time or generation."""
    text = json.dumps([str(location), found], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _copy(
    store: Any, location: RemoteAdapter, name: str, target: Path, size: int | None, meter: Meter
) -> None:
    num_bytes = 0
    with (
        store.open(f"{location}/{name}", "rb", block_size=BLOCK_BYTES) as source,
        target.open("xb") as sink,
    ):
        while piece := source.read(PIECE_BYTES):
            meter.add(len(piece))
            num_bytes += len(piece)
            sink.write(piece)
    if num_bytes != size:
        raise SourceUnavailable(f"{location}: {name} was cut off after {num_bytes} of {size} bytes")


@contextmanager
def _in_own_words(location: RemoteAdapter) -> Iterator[None]:
    try:
        yield
    except FathomError:
        raise
    except ImportError:
        hint = "pip install 'fathom-lora[s3]'" if location.scheme == "s3" else "see fsspec's pages"
        raise AdapterError(
            f"{location}: the library for {location.scheme}:// is not installed: {hint}"
        ) from None
    except PermissionError:
        raise AdapterError(
            f"{location}: the store does not let this server's credentials read it"
        ) from None
    except FileNotFoundError:
        raise NotFound(f"{location}: was removed while it was fetched", param="lora_path") from None
    except Exception as error:  # noqa: BLE001 -- whatever it is, its text stays here
        if location.scheme not in BUILT_IN_SCHEMES and isinstance(error, ValueError):
            raise AdapterError(f"{location}: fsspec knows no {location.scheme}://") from None
        why = error.strerror if isinstance(error, OSError) and error.filename is not None else None
        raise SourceUnavailable(
            f"{location}: {why or 'the store cannot be reached'} ({type(error).__name__})"
        ) from None
