"""The cache: whole cuts or none, never over its limit, and never one taken from under who uses it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from server.errors import Overloaded
from server.vllm.cut_cache import CutCache

SIZE = 1000


def writes(content: bytes = b"x" * SIZE) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        out.mkdir()
        (out / "weights").write_bytes(content)

    return write


def never(out: Path) -> None:
    raise AssertionError("was there already")


def keys(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def test_what_is_made_once_is_found_again(tmp_path: Path) -> None:
    cache = CutCache(tmp_path, 10 * SIZE)
    assert cache.get("k") is None
    made = cache.make("k", writes())
    assert cache.make("k", never).path == made.path == tmp_path / "k"
    assert (made.path / "weights").read_bytes() == b"x" * SIZE
    assert CutCache(tmp_path, 10 * SIZE).make("k", never).path == made.path  # the next process


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    cache = CutCache(tmp_path, 10 * SIZE)

    def fails(out: Path) -> None:
        writes()(out)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.make("k", fails)
    assert cache.get("k") is None
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_the_least_recently_used_goes_first_and_what_is_held_stays(tmp_path: Path) -> None:
    cache = CutCache(tmp_path, 3 * SIZE)
    held = cache.make("held", writes())
    for place, key in enumerate(("old", "new")):
        cache.make(key, writes()).release()
        os.utime(tmp_path / key, (place, place))
    found = cache.get("old")  # used again
    assert found is not None
    found.release()
    cache.make("next", writes()).release()
    assert keys(tmp_path) == {"held", "old", "next"}
    held.release()
    os.utime(tmp_path / "held", (0, 0))
    cache.make("last", writes()).release()
    assert keys(tmp_path) == {"old", "next", "last"}


def test_nothing_is_made_beyond_the_limit(tmp_path: Path) -> None:
    cache = CutCache(tmp_path, 2 * SIZE)
    held = [cache.make(key, writes()) for key in ("1", "2")]
    with pytest.raises(Overloaded, match="2000 bytes are in use, 1000 more are needed"):
        cache.make("3", writes())
    assert keys(tmp_path) == {"1", "2"}
    held[0].release()
    cache.make("3", writes())
    assert keys(tmp_path) == {"2", "3"}


def test_a_cut_that_another_process_uses_stays_until_that_process_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.vllm.cut_cache import CutCache\n"
        f"cut = CutCache(Path({str(tmp_path)!r}), {SIZE}).get('theirs')\n"
        "print(cut.path, flush=True); sys.stdin.read()"
    )
    cache = CutCache(tmp_path, SIZE)
    cache.make("theirs", writes()).release()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        with pytest.raises(Overloaded):
            cache.make("ours", writes())
        process.send_signal(signal.SIGKILL)
    cache.make("ours", writes())
    assert keys(tmp_path) == {"ours"}


def test_what_a_killed_process_left_unfinished_is_swept_and_what_a_living_one_makes_is_not(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; from pathlib import Path; from server.vllm.cut_cache import CutCache\n"
        f"with CutCache(Path({str(tmp_path)!r}), {SIZE}).room() as room:\n"
        " (room / 'half').write_bytes(b'x'); print(room, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        room = Path(process.stdout.readline().decode().strip())
        CutCache(tmp_path, SIZE)
        assert (room / "half").exists()
        process.send_signal(signal.SIGKILL)
    assert (room / "half").exists()
    CutCache(tmp_path, SIZE)
    assert not room.exists()


def test_many_at_once_make_one(tmp_path: Path) -> None:
    cache = CutCache(tmp_path, 2 * SIZE)
    barrier = Barrier(8)

    def make(place: int) -> Path:
        def write(out: Path) -> None:
            writes(bytes([place]) * SIZE)(out)

        barrier.wait()
        cut = cache.make("k", write)
        content = (cut.path / "weights").read_bytes()
        assert content == content[:1] * SIZE
        cut.release()
        return cut.path

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(make, range(8))) == {tmp_path / "k"}
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "k"}


def test_to_release_twice_closes_nobody_elses_file(tmp_path: Path) -> None:
    cut = CutCache(tmp_path, SIZE).make("k", writes())
    cut.release()
    descriptor = os.open(tmp_path, os.O_RDONLY)  # likely the same number
    cut.release()
    os.fstat(descriptor)
    os.close(descriptor)
