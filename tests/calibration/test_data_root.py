"""A client names files below one directory, and learns nothing of any other."""

import os
from pathlib import Path

import pytest

from server.calibration.data_root import read
from server.errors import BadRequest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    (root / "valid.jsonl").write_text("{}\n")
    (root / "deep" / "test.jsonl").write_text("{}\n")
    (root / "inside.jsonl").symlink_to(root / "deep" / "test.jsonl")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (root / "outside.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe")
    (root / "device").symlink_to("/dev/zero")
    return root


@pytest.mark.parametrize(
    "name", ["valid.jsonl", "deep/test.jsonl", "./valid.jsonl", "inside.jsonl"]
)
def test_files_below_the_root_are_found(root: Path, name: str) -> None:
    assert read(root, name) == b"{}\n"


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert read(tmp_path / "alias", "valid.jsonl") == b"{}\n"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{root}/valid.jsonl", "relative path"),
        ("/etc/passwd", "relative path"),
        ("../secret.jsonl", r"without '\.\.'"),
        ("deep/../valid.jsonl", r"without '\.\.'"),
        ("..\\secret.jsonl", "relative path"),
        ("outside.jsonl", "leads out"),
        ("up/secret.jsonl", "leads out"),
        ("device", "leads out"),
        ("missing.jsonl", "no file"),
        ("dangling", "no file"),
        ("loop", "leads to itself"),
        ("valid.jsonl/more", "Not a directory"),
        ("null\x00byte", "control character"),
        ("line\nbreak", "control character"),
        ("x" * 300, "name too long"),
        ("x/" * 3000, "4096"),
        (".", "not a regular file"),
        ("deep", "not a regular file"),
        ("pipe", "not a regular file"),
    ],
)
def test_everything_else_is_refused_by_its_field(root: Path, name: str, why: str) -> None:
    with pytest.raises(BadRequest, match=why) as caught:
        read(root, name.format(root=root))
    assert caught.value.param == "dataset.file"
    assert "secret.jsonl'" not in caught.value.message or "secret" in name


def test_outside_the_root_existence_is_not_told(root: Path) -> None:
    messages = set()
    for name in ("../secret.jsonl", "../no-such.jsonl"):
        with pytest.raises(BadRequest) as caught:
            read(root, name)
        messages.add(caught.value.message.replace(name, "NAME"))
    assert len(messages) == 1


def test_without_a_root_no_file_can_be_named() -> None:
    with pytest.raises(BadRequest, match="--data-root"):
        read(None, "valid.jsonl")
