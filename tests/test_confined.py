"""Nothing outside of a directory is opened through it, also while somebody changes what lies in it."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server import confined
from server.confined import PathRefused, check_spelling, locate, open_file, read_file

SECRET = b"what nobody may read"
INSIDE = b"what anybody may read"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "root"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "file").write_bytes(INSIDE)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(SECRET)
    (root / "link").symlink_to("deep/file")
    (root / "folder").symlink_to("deep")
    (root / "absolute").symlink_to(root / "deep" / "file")
    (root / "out").symlink_to(tmp_path / "outside" / "file")
    (root / "out_folder").symlink_to("../outside")
    (root / "chain").symlink_to("out")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    (root / "device").symlink_to("/dev/zero")
    (root / "process").symlink_to("/proc/self/environ")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(root, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/socket")  # the path itself may be too long for one
        os.close(here)
        yield root


def content(root: Path, path: str | Path) -> bytes:
    return read_file(root, Path(path), 1000)


@pytest.mark.parametrize("path", ["deep/file", "link", "folder/file", "absolute", "./deep//file"])
def test_what_lies_below_the_root_is_read(root: Path, path: str) -> None:
    assert content(root, path) == INSIDE
    assert content(root, root / path) == INSIDE


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("out", "leads out"),
        ("out_folder/file", "leads out"),
        ("chain", "leads out"),
        ("device", "leads out"),
        ("process", "leads out"),
        ("deep/../../outside/file", "leads out"),
        ("/etc/passwd", "leads out"),
        ("/", "leads out"),
        ("loop", "leads to itself"),
        ("pipe", "regular file"),
        ("socket", "regular file"),
        ("deep", "regular file"),
        (".", "regular file"),
        ("deep/file/more", "Not a directory"),
        ("x" * 300, "name too long"),
        ("nul\0", "null"),
    ],
)
def test_what_does_not_is_refused(root: Path, path: str, why: str) -> None:
    with pytest.raises(PathRefused, match=why):
        content(root, path)


@pytest.mark.parametrize("path", ["dangling", "missing", "deep/missing"])
def test_what_is_not_there_is_missing(root: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError):
        content(root, path)


def test_a_file_over_the_limit_is_refused(root: Path) -> None:
    with pytest.raises(PathRefused, match="limit of 5 bytes"):
        read_file(root, Path("link"), 5)


@pytest.mark.parametrize(
    "path", ["", "..", "a/../b", "../a", "a\nb", "a\x7f", "a\0", "a\u202eb", "..\\a", "a/" * 2049]
)
def test_a_spelling_that_no_honest_path_has_is_refused(path: str) -> None:
    with pytest.raises(PathRefused):
        check_spelling(path)
    check_spelling("a..b/c d/é")


def trusting(root: Path, path: Path) -> bytes:
    """The control: what was checked is opened by its name."""
    return locate(root, path).read_bytes()


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_link_put_in_place_after_the_check_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    real = os.path.realpath

    def swap_after(path: str | Path) -> str:
        found = real(path)
        victim = {"file": root / "deep" / "file", "folder": root / "deep"}[swapped]
        if found == str(root / "deep" / "file") and not victim.is_symlink():
            victim.rename(root / "moved")
            victim.symlink_to({"file": "../../outside/file", "folder": "../outside"}[swapped])
        return found

    def attempt(read: Callable[[Path, Path], bytes]) -> bytes:
        monkeypatch.setattr(confined.os.path, "realpath", swap_after)
        try:
            return read(root, Path("deep/file"))
        finally:
            monkeypatch.setattr(confined.os.path, "realpath", real)
            victim = {"file": root / "deep" / "file", "folder": root / "deep"}[swapped]
            victim.unlink()
            (root / "moved").rename(victim)

    assert attempt(trusting) == SECRET
    with pytest.raises(PathRefused):
        attempt(content)
    assert content(root, "deep/file") == INSIDE


def test_swapping_all_the_time_never_shows_what_lies_outside(root: Path) -> None:
    is_over = threading.Event()
    (root / "other").symlink_to("../outside")

    def swap() -> None:
        while not is_over.is_set():
            os.rename(root / "deep", root / "aside")
            os.rename(root / "other", root / "deep")
            os.rename(root / "deep", root / "other")
            os.rename(root / "aside", root / "deep")

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    try:
        for _ in range(3000):
            try:
                seen.add(content(root, "deep/file"))
            except (PathRefused, FileNotFoundError) as refusal:
                seen.add(str(type(refusal)).encode())
    finally:
        is_over.set()
        swapping.join()
    assert SECRET not in seen
    assert INSIDE in seen


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("deep/file", "out", "pipe", "missing", "deep/file/more", "loop", "deep"):
        try:
            file, size = open_file(root, Path(path))
        except (PathRefused, FileNotFoundError):
            continue
        assert size == len(INSIDE)
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before
