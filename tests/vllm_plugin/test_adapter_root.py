"""Copies out of the root: what they are, what is not copied, and what counts as a change."""

import os
import shutil
from pathlib import Path

import pytest

from boundary import record
from server.confined import PathRefused
from server.errors import AdapterError
from server.vllm.adapter_root import AdapterRoot

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for directory in (root / "a", root / "b", tmp_path / "outside"):
        directory.mkdir(parents=True)
        (directory / CONFIG).write_text("{}")
        (directory / WEIGHTS).write_bytes(b"weights")
        (directory / "tokenizer.json").write_text("not ours")
    return root


def copy(root: Path, name: str, out: str = "out", max_bytes: int = MAX) -> str:
    found = AdapterRoot(root).find(name)
    assert found is not None
    return AdapterRoot(root).copy(found, root.parent / out, max_bytes)


def test_a_copy_is_both_files_and_nothing_else(root: Path) -> None:
    copy(root, "a")
    assert sorted(path.name for path in (root.parent / "out").iterdir()) == [CONFIG, WEIGHTS]
    assert (root.parent / "out" / WEIGHTS).read_bytes() == b"weights"


def test_equal_content_has_one_digest_and_any_other_another(root: Path) -> None:
    first = copy(root, "a", "1")
    assert copy(root, "b", "2") == first
    (root / "b" / WEIGHTS).write_bytes(b"Weights")
    assert copy(root, "b", "3") != first
    shutil.copy(root / "a" / WEIGHTS, root / "b")
    (root / "b" / CONFIG).write_text("{ }")
    assert copy(root, "b", "4") != first


@pytest.mark.parametrize("name", ["c", "..", ".", "", "../outside", "a/../../outside", "a\0"])
def test_nothing_else_is_an_adapter(root: Path, name: str) -> None:
    assert not AdapterRoot(root).is_adapter(name)
    assert AdapterRoot(root).signature(name) is None


def test_links_count_only_within_the_root(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "outside")
    (root / "in").symlink_to("a")
    found = AdapterRoot(root)
    assert not found.is_adapter("out")
    assert found.find("in") == root.resolve() / "a"
    # The control: the same directory, within.
    (root.parent / "outside").rename(root / "out2")
    assert found.is_adapter("out2")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_leads_out_is_not_copied(root: Path, file: str) -> None:
    (root / "a" / file).unlink()
    (root / "a" / file).symlink_to(root.parent / "outside" / file)
    with pytest.raises(AdapterError, match=f"{file} leads out of the root"):
        copy(root, "a")


def test_a_pipe_is_not_waited_for(root: Path) -> None:
    (root / "a" / WEIGHTS).unlink()
    os.mkfifo(root / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="is not a regular file"):
        copy(root, "a")


def test_a_pickle_is_named(root: Path) -> None:
    (root / "a" / WEIGHTS).rename(root / "a" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        copy(root, "a")


def test_more_than_the_cache_holds_is_refused_unread(root: Path) -> None:
    with (root / "a" / WEIGHTS).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(AdapterError, match="over the limit"):
        copy(root, "a")


def test_a_record_outside_is_not_read(root: Path) -> None:
    found = AdapterRoot(root)
    assert found.record(root / "a") is None
    (root / "a" / record.FILE_NAME).write_text("record")
    assert found.record(root / "a") == b"record"
    (root.parent / "outside" / record.FILE_NAME).write_text("foreign")
    (root / "b" / record.FILE_NAME).symlink_to(root.parent / "outside" / record.FILE_NAME)
    with pytest.raises(PathRefused):
        found.record(root / "b")


def test_every_change_is_seen(root: Path) -> None:
    found = AdapterRoot(root)
    (root / "current").symlink_to("a")
    seen = [found.signature("current")]
    assert found.signature("current") == seen[0]

    def now() -> None:
        signature = found.signature("current")
        assert signature not in seen
        seen.append(signature)

    (root / "a" / WEIGHTS).write_bytes(b"weightS")  # as long as before
    now()
    (root / "a" / record.FILE_NAME).write_text("{}")
    now()
    (root / "a" / record.FILE_NAME).unlink()
    (root / "a" / CONFIG).write_text("{ }")
    now()
    (root / "current").unlink()
    (root / "current").symlink_to("b")
    now()
    shutil.rmtree(root / "b")
    now()
    assert seen[-1] is None
