"""Adapters on the Hugging Face hub, by its own client, in its own cache.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and all else that
`huggingface_hub` reads mean here what they mean there. A revision is turned into its commit once,
and every file is that commit's. What the cache holds of a commit is not asked for again; offline,
or when the hub cannot be reached, the commit is the one that the revision last was.
"""

import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from boundary.checkpoint_files import PICKLE_NAME
from server.errors import SourceUnavailable
from server.sources.files import NAMES, OPTIONAL, REQUIRED, Fetched, check_complete, check_sizes
from server.sources.hub_errors import MAIN, in_own_words
from server.sources.location import RemoteAdapter
from server.sources.meter import Meter

log = structlog.get_logger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(location: RemoteAdapter, max_bytes: Mapping[str, int], meter: Meter) -> Fetched:
    """The adapter's files in the hub's cache, all of one commit.

    Raises NotFound, AdapterError, and SourceUnavailable where the hub cannot be reached
    and the cache does not hold it.
    """
    # Its warnings of a download that is tried again hold the URL.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if is_offline_mode():
        cached = find_cached(location)
        if cached is None:
            raise SourceUnavailable(
                f"{location}: not in the hub's cache, and HF_HUB_OFFLINE forbids to ask for it"
            )
        return cached
    if location.revision is not None and _COMMIT.fullmatch(location.revision):
        cached = find_cached(location, is_whole=True)
        if cached is not None:
            return cached
    try:
        return _download(location, max_bytes, meter)
    except SourceUnavailable as error:
        cached = find_cached(location)
        if cached is None:
            raise
        log.warning("an adapter is the cache's", adapter=str(location), reason=error.message)
        return cached


def find_cached(location: RemoteAdapter, *, is_whole: bool = False) -> Fetched | None:
    """What the cache holds of this revision, as of when it was last asked for.

    is_whole: only if it is also known whether there is a record beside the weights.
    """
    folder = _folder(location)
    commit = location.revision or MAIN
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None

    def cached(name: str) -> object:
        return try_to_load_from_cache(location.root, _inside(location, name), revision=commit)

    if not all(isinstance(cached(name), str) for name in REQUIRED):
        return None
    if is_whole and any(cached(name) is None for name in OPTIONAL):
        return None
    return _fetched(location, commit, folder)


def _download(location: RemoteAdapter, max_bytes: Mapping[str, int], meter: Meter) -> Fetched:
    revision = location.revision or MAIN
    found: dict[str, int | None] = {}
    commits = set[str | None]()
    for name in NAMES:
        with suppress(EntryNotFoundError), in_own_words(location):
            metadata = get_hf_file_metadata(_url(location, name, revision))
            found[name] = metadata.size
            commits.add(metadata.commit_hash)
    check_complete(location, iter(found), has_pickle=len(found) < 2 and _has_pickle(location))
    commit = commits.pop()
    if commits:
        raise SourceUnavailable(f"{location}: changed while it was looked at; ask again")
    if commit is None or not _COMMIT.fullmatch(commit):
        raise SourceUnavailable(f"{location}: the hub does not say which commit this is")
    meter.expect(check_sizes(location, found, max_bytes))
    missing = [
        name for name in OPTIONAL if name not in found
    ]  # which the client notes in its cache
    for name in [*sorted(found, key=lambda name: found[name] or 0, reverse=True), *missing]:
        with suppress(EntryNotFoundError), in_own_words(location):
            hf_hub_download(
                location.root,
                _inside(location, name),
                revision=commit,
                tqdm_class=_metered(meter),
            )
    folder = _folder(location)
    if revision != commit:
        _note_revision(folder / "refs" / revision, commit)
    return _fetched(location, commit, folder)


def _fetched(location: RemoteAdapter, commit: str, folder: Path) -> Fetched:
    at_commit = RemoteAdapter("hf", location.root, location.folder, commit)
    # A snapshot is links to the repository's blobs, which may be links to blobs that all share.
    root = Path(constants.HF_HUB_CACHE)
    return Fetched(at_commit, folder / "snapshots" / commit / location.folder, root)


def _note_revision(path: Path, commit: str) -> None:
    """What the client does before a download, done after it: else offline would find half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        incoming = path.with_name(f".{uuid.uuid4().hex}")
        incoming.write_text(commit, encoding="ascii")
        os.replace(incoming, path)
    except OSError as error:  # a cache that may not be written to
        log.warning("a revision could not be noted", path=str(path), reason=error.strerror)


def _has_pickle(location: RemoteAdapter) -> bool:
    with suppress(EntryNotFoundError), in_own_words(location):
        get_hf_file_metadata(_url(location, PICKLE_NAME, location.revision or MAIN))
        return True
    return False


def _folder(location: RemoteAdapter) -> Path:
    """All that the cache holds of a repository."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=location.root, repo_type="model"))


def _inside(location: RemoteAdapter, name: str) -> str:
    return f"{location.folder}/{name}" if location.folder else name


def _url(location: RemoteAdapter, name: str, revision: str) -> str:
    return hf_hub_url(location.root, _inside(location, name), revision=revision)


def _metered(meter: Meter) -> type[Any]:
    """The client's progress bar, which it tells of every piece: here nothing is drawn."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            meter.add(int(n or 0))

    return Bar
