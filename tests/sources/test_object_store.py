"""Adapters from S3: the real s3fs against a real S3 server on loopback; and fsspec's other schemes."""

import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from server.errors import AdapterError, NotFound, SourceUnavailable
from server.model.checkpoint import read_checkpoint
from server.sources import object_store
from server.sources.location import RemoteAdapter
from tests.sources.conftest import BUCKET, SECRET, MakeFetcher, upload
from tests.tiny import Tiny

PLACE = RemoteAdapter("s3", BUCKET, "team/x")
WEIGHTS = "adapter_model.safetensors"


def kept(tmp_path: Path) -> list[Path]:
    root = tmp_path / "cache"
    return sorted(root.iterdir()) if root.exists() else []


def test_an_adapter_is_what_it_is_on_disk(
    s3: Any, tiny: Tiny, make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    """Of a folder that holds other things too, the adapter's own files come."""
    upload(s3, tiny.adapter("a"), "team/x")
    for name in ("run.py", "adapter_model.bin", "deeper/adapter_config.json"):
        s3.put_object(Bucket=BUCKET, Key=f"team/x/{name}", Body=b"x")
    fetched = make_fetcher().fetch(PLACE)
    found = read_checkpoint(fetched.path, tiny.targets, root=fetched.root)
    assert found.digest == read_checkpoint(tiny.adapter("a"), tiny.targets).digest
    assert fetched.location == PLACE
    assert sorted(path.name for path in fetched.path.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert kept(tmp_path) == [fetched.path]


def test_what_did_not_change_is_not_fetched_again(
    s3: Any, tiny: Tiny, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3, tiny.adapter("a"), "team/x")
    first = make_fetcher().fetch(PLACE)
    copied = list[str]()
    copy = object_store._copy
    monkeypatch.setattr(
        object_store, "_copy", lambda *given: (copied.append(given[2]), copy(*given))
    )
    assert make_fetcher().fetch(PLACE) == first
    assert copied == []
    upload(s3, tiny.adapter("b"), "team/x")
    second = make_fetcher().fetch(PLACE)
    assert second.path != first.path
    assert sorted(copied) == ["adapter_config.json", WEIGHTS]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (RemoteAdapter("s3", BUCKET, "team"), r"adapter_config\.json is missing"),
        (RemoteAdapter("s3", BUCKET, "team/xy"), r"adapter_config\.json is missing"),
        (RemoteAdapter("s3", "no-such-bucket", "x"), r"adapter_config\.json is missing"),
    ],
)
def test_what_is_not_there_is_not_found(
    s3: Any, tiny: Tiny, make_fetcher: MakeFetcher, place: RemoteAdapter, words: str
) -> None:
    upload(s3, tiny.adapter("a"), "team/x")
    with pytest.raises(NotFound, match=words):
        make_fetcher().fetch(place)


def test_a_pickle_is_named_and_never_fetched(
    s3: Any, tiny: Tiny, make_fetcher: MakeFetcher
) -> None:
    upload(s3, tiny.adapter("a"), "team/x")
    s3.delete_object(Bucket=BUCKET, Key=f"team/x/{WEIGHTS}")
    with pytest.raises(NotFound, match=f"{WEIGHTS} is missing"):
        make_fetcher().fetch(PLACE)
    s3.put_object(Bucket=BUCKET, Key="team/x/adapter_model.bin", Body=b"x")
    with pytest.raises(AdapterError, match="is a pickle"):
        make_fetcher().fetch(PLACE)


def test_files_over_their_limits_are_not_begun(
    s3: Any, tiny: Tiny, make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    upload(s3, tiny.adapter("a"), "team/x")
    size = (tiny.adapter("a") / WEIGHTS).stat().st_size
    with pytest.raises(AdapterError, match=f"{size} bytes, over max_fetch_bytes, {size - 1}"):
        make_fetcher(max_weights_bytes=size - 1).fetch(PLACE)
    make_fetcher(max_weights_bytes=size).fetch(PLACE)
    s3.put_object(Bucket=BUCKET, Key="team/x/boundary.json", Body=bytes((1 << 20) + 1))
    with pytest.raises(AdapterError, match=r"boundary\.json has 1048577 bytes, over the limit"):
        make_fetcher().fetch(PLACE)
    assert len(kept(tmp_path)) == 1


def test_an_adapter_that_is_overwritten_meanwhile_is_not_half_and_half(
    s3: Any,
    tiny: Tiny,
    make_fetcher: MakeFetcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(s3, tiny.adapter("a"), "team/x")
    copy = object_store._copy

    def overwritten_after(*given: Any) -> None:
        copy(*given)
        upload(s3, tiny.adapter("b"), "team/x")

    monkeypatch.setattr(object_store, "_copy", overwritten_after)
    with pytest.raises(SourceUnavailable, match=r"changed while it was fetched"):
        make_fetcher().fetch(PLACE)
    assert kept(tmp_path) == []
    monkeypatch.setattr(object_store, "_copy", copy)
    make_fetcher().fetch(PLACE)


def test_a_fetch_that_takes_too_long_is_told_so_and_leaves_nothing(
    s3: Any,
    tiny: Tiny,
    make_fetcher: MakeFetcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(s3, tiny.adapter("a"), "team/x")
    held, copy = threading.Event(), object_store._copy
    monkeypatch.setattr(object_store, "_copy", lambda *given: (held.wait(60), copy(*given)))
    with pytest.raises(SourceUnavailable, match="within fetch_timeout_s"):
        make_fetcher(timeout_s=0.5).fetch(PLACE)
    (thread,) = (each for each in threading.enumerate() if each.name == "fathom-fetch")
    held.set()
    thread.join(30)
    assert not thread.is_alive()
    assert kept(tmp_path) == []


def test_a_store_that_is_not_there_is_told_in_own_words(
    s3: Any,
    new_instance: None,
    make_fetcher: MakeFetcher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable, match=r"^s3://adapters/team/x: the store") as refusal:
        make_fetcher().fetch(PLACE)
    assert SECRET not in str(refusal.value)
    assert kept(tmp_path) == []


def test_without_credentials_the_store_is_not_read(
    s3: Any, new_instance: None, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        (SourceUnavailable, AdapterError), match=r"^s3://adapters/team/x: the store"
    ):
        make_fetcher().fetch(PLACE)


def test_other_schemes_are_fetched_where_they_are_allowed(
    tiny: Tiny, make_fetcher: MakeFetcher
) -> None:
    """`memory` is one that fsspec brings itself."""
    store = fsspec.filesystem("memory")
    for path in tiny.adapter("a").iterdir():
        store.pipe_file(f"memory://shelf/x/{path.name}", path.read_bytes())
    place = RemoteAdapter("memory", "shelf", "x")
    with pytest.raises(AdapterError, match=r"not fetched by memory://; adapter_scheme"):
        make_fetcher().fetch(place)
    fetched = make_fetcher(schemes=("memory",)).fetch(place)
    assert (
        read_checkpoint(fetched.path, tiny.targets).digest
        == read_checkpoint(tiny.adapter("a"), tiny.targets).digest
    )
    with pytest.raises(AdapterError, match="fsspec knows no nothing://"):
        make_fetcher(schemes=("nothing",)).fetch(RemoteAdapter("nothing", "x"))
