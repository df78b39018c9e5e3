"""Adapters on this disk: whole or not there, and no more of them than there is room for."""

import os
import time
from pathlib import Path

from server.sources.cache import ABANDONED_S, INCOMING, AdapterCache


def keep(cache: AdapterCache, key: str, num_bytes: int, *, age_s: float = 0.0) -> Path:
    with cache.incoming() as folder:
        (folder / "weights").write_bytes(bytes(num_bytes))
        path = cache.keep(folder, key)
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path / "deep" / "cache", 100)
    assert cache.find("a") is None
    path = keep(cache, "a", 10)
    assert cache.find("a") == path
    assert (path / "weights").stat().st_size == 10
    assert (path.stat().st_mode & 0o777, names(path.parent)) == (0o700, ["a"])


def test_what_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path, 100)
    with cache.incoming() as folder:
        (folder / "weights").write_bytes(b"half")
    assert names(tmp_path) == []


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path, 100)
    for age_s, key in ((30, "oldest"), (20, "old"), (10, "new")):
        keep(cache, key, 30, age_s=age_s)
    cache.find("oldest")
    keep(cache, "newest", 30)
    assert names(tmp_path) == ["new", "newest", "oldest"]
    keep(cache, "huge", 500)
    assert names(tmp_path) == ["huge"]


def test_two_that_fetch_the_same_keep_it_once(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path, 100)
    first = keep(cache, "a", 10)
    assert keep(cache, "a", 10) == first
    assert names(tmp_path) == ["a"]


def test_what_a_killed_process_left_goes_and_what_still_comes_stays(tmp_path: Path) -> None:
    for name, age_s in ((f"{INCOMING}old", ABANDONED_S + 60), (f"{INCOMING}new", 60.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(50))
        then = time.time() - age_s
        os.utime(tmp_path / name, (then, then))
    keep(AdapterCache(tmp_path, 20), "a", 10)
    assert names(tmp_path) == [f"{INCOMING}new", "a"]
