"""The keys file: written whole, read strictly, and never showing in an error what it holds."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from server.access import key_file, secret
from server.access.hashed_key import NoSuchKey
from server.access.key import Grant, NewKey
from server.access.key_file import KeyFileError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_what_is_added_is_read_again_and_only_hashed(path: Path) -> None:
    grant = Grant(adapters=("sql*",), max_depth=6, requests_per_minute=60, tokens_per_minute=999)
    ada, ada_text = key_file.add(path, NewKey(name="ada", grant=grant))
    bob, bob_text = key_file.add(path, NewKey(name="bob", scope="admin"))
    assert key_file.read(path) == {ada.key.id: ada, bob.key.id: bob}
    assert secret.matches(ada_text, ada.hash)
    assert not secret.matches(bob_text, ada.hash)
    content = path.read_text()
    for text in (ada_text, bob_text):
        assert text.split("-", 2)[2][:20] not in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["keys.json"]


def test_a_revoked_key_stays_with_its_time(path: Path) -> None:
    made, _ = key_file.add(path, NewKey(name="ada"))
    first = key_file.revoke(path, made.key.id)
    assert first.revoked_at is not None
    assert key_file.revoke(path, made.key.id) == first
    assert key_file.read(path)[made.key.id] == first
    with pytest.raises(NoSuchKey):
        key_file.revoke(path, "0" * 16)


def test_a_file_that_changed_has_another_signature(path: Path) -> None:
    assert key_file.signature(path) is None
    made, _ = key_file.add(path, NewKey(name="ada"))
    seen = {key_file.signature(path)}
    key_file.revoke(path, made.key.id)
    seen.add(key_file.signature(path))
    assert len(seen) == 2
    assert key_file.signature(path) in seen


def test_a_second_writer_is_told_so(path: Path) -> None:
    key_file.add(path, NewKey(name="ada"))
    before = path.read_bytes()
    with key_file._Writing(path), pytest.raises(KeyFileError, match="another"):
        key_file.add(path, NewKey(name="bob"))
    assert path.read_bytes() == before
    key_file.add(path, NewKey(name="bob"))


def test_a_write_that_fails_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file.add(path, NewKey(name="ada"))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(key_file.os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        key_file.add(path, NewKey(name="bob"))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["keys.json"]


def test_a_link_is_written_through(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    key_file.add(path, NewKey(name="ada"))
    link.symlink_to(path)
    key_file.add(link, NewKey(name="bob"))
    assert link.is_symlink()
    assert len(key_file.read(path)) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file["keys"][0].pop("hash"), "keys.0.hash"),
        (lambda file: file["keys"][0].update(hash="s3cr3t"), "keys.0.hash"),
        (lambda file: file["keys"][0].update(expires="s3cr3t"), "keys.0.expires"),
        (lambda file: file["keys"][0].update(id="S3CR3T"), "keys.0.id"),
        (lambda file: file["keys"][0].update(scope="s3cr3t"), "keys.0.scope"),
        (lambda file: file["keys"][0].update(created_at="2026-01-01T00:00:00"), "created_at"),
        (lambda file: file["keys"][0]["grant"].update(max_depth="s3cr3t"), "grant.max_depth"),
        (lambda file: file["keys"].append(file["keys"][0]), "an id twice"),
        (lambda file: file.update(version=2), "version"),
        (lambda file: file.clear(), "keys"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_its_field(
    path: Path, change: Any, problem: str
) -> None:
    key_file.add(path, NewKey(name="ada"))
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(KeyFileError) as caught:
        key_file.read(path)
    message = str(caught.value)
    assert problem in message
    assert "\n" not in message
    assert "s3cr3t" not in message.lower()
    assert "$scrypt" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"keys": null}'])
def test_what_is_no_keys_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        key_file.read(path)
    with pytest.raises(KeyFileError):
        key_file.add(path, NewKey(name="ada"))
    assert path.read_bytes() == content


def test_a_missing_or_huge_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        key_file.read(path)
    key_file.add(path, NewKey(name="ada"))
    monkeypatch.setattr(key_file, "MAX_BYTES", 10)
    with pytest.raises(KeyFileError, match="larger than 10"):
        key_file.read(path)
