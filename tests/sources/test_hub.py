"""Adapters from a hub: the real client against a loopback server of the hub's files."""

import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from server.errors import AdapterError, FathomError, NotFound, SourceUnavailable
from server.model.checkpoint import read_checkpoint
from server.sources.files import Fetched
from server.sources.location import RemoteAdapter
from tests.sources.conftest import MakeFetcher
from tests.sources.hub_site import WEIGHTS, HubSite, Repository, files_of
from tests.tiny import Tiny

TOKEN = "hf_the-token-of-a-test"
PLACE = RemoteAdapter("hf", "org/name")


@pytest.fixture
def repository(hub: HubSite, tiny: Tiny) -> Repository:
    """`org/name`, whose branch main is the adapter `a` beside files that nobody needs."""
    found = hub.repositories["org/name"] = Repository()
    files = files_of(tiny.adapter("a")) | {"run.py": b"print()", "optimizer.pt": b"\x80"}
    found.commit(files, "main")
    return found


def cached_files(tmp_path: Path) -> list[str]:
    """Names in the hub's cache, without its locks and its own marks."""
    root = tmp_path / "hub"
    files = (path.relative_to(root) for path in root.rglob("*") if not path.is_dir())
    return sorted(path.name for path in files if path.parts[0] not in (".locks", "CACHEDIR.TAG"))


def digest(tiny: Tiny, fetched: Fetched) -> str:
    return read_checkpoint(fetched.path, tiny.targets, root=fetched.root).digest


def test_an_adapter_is_what_it_is_on_disk(
    hub: HubSite, repository: Repository, tiny: Tiny, make_fetcher: MakeFetcher
) -> None:
    fetched = make_fetcher().fetch(PLACE)
    assert digest(tiny, fetched) == read_checkpoint(tiny.adapter("a"), tiny.targets).digest
    assert fetched.location.revision == repository.revisions["main"]
    assert sorted(path.name for path in fetched.path.iterdir()) == ["adapter_config.json", WEIGHTS]


def test_a_blob_that_repositories_share_is_read_and_one_outside_is_not(
    repository: Repository, tiny: Tiny, make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    """The client may keep a blob once for all repositories, and link to it."""
    fetched = make_fetcher().fetch(PLACE)
    expected, blob = digest(tiny, fetched), (fetched.path / WEIGHTS).resolve()
    for place, is_read in ((tmp_path / "hub" / "blobs", True), (tmp_path / "outside", False)):
        place.mkdir()
        blob.rename(place / "x")
        blob.symlink_to(place / "x")
        if is_read:
            assert digest(tiny, fetched) == expected
        else:
            with pytest.raises(AdapterError, match="leads out of the root"):
                digest(tiny, fetched)
        blob.unlink()
        (place / "x").rename(blob)


def test_nothing_but_the_adapters_own_files_is_asked_for(
    hub: HubSite, repository: Repository, make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    """The list of files, in which one leads out of the repository, is never read."""
    make_fetcher().fetch(PLACE)
    asked = {path.rsplit("/", 1)[-1] for path in hub.paths() if "/blob/" not in path}
    assert asked == {"adapter_config.json", WEIGHTS, "boundary.json"}
    assert not [path for path in hub.paths() if path.startswith("/api/")]
    assert not [path for path in tmp_path.rglob("*") if path.name in ("run.py", "outside.txt")]


def test_a_revision_and_a_folder_are_what_is_named(
    hub: HubSite, repository: Repository, tiny: Tiny, make_fetcher: MakeFetcher
) -> None:
    files = {f"deep/er/{name}": data for name, data in files_of(tiny.adapter("b")).items()}
    commit = repository.commit(files, "refs/pr/1")
    fetched = make_fetcher().fetch(RemoteAdapter("hf", "org/name", "deep/er", "refs/pr/1"))
    assert digest(tiny, fetched) == read_checkpoint(tiny.adapter("b"), tiny.targets).digest
    assert fetched.location.revision == commit
    with pytest.raises(NotFound, match=r"adapter_config\.json is missing"):
        make_fetcher().fetch(RemoteAdapter("hf", "org/name", "deep", "refs/pr/1"))


def test_a_branch_that_moved_is_fetched_anew_and_a_commit_is_not(
    hub: HubSite, repository: Repository, tiny: Tiny, make_fetcher: MakeFetcher
) -> None:
    fetcher = make_fetcher()
    first = fetcher.fetch(PLACE)
    repository.commit(files_of(tiny.adapter("b")), "main")
    second = fetcher.fetch(PLACE)
    assert digest(tiny, first) != digest(tiny, second)
    hub.requests.clear()
    again = fetcher.fetch(first.location)
    assert (again, hub.requests) == (first, [])


def test_the_token_is_sent_to_the_hub_alone(
    hub: HubSite,
    repository: Repository,
    make_fetcher: MakeFetcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without one, the repository is as good as not there."""
    repository.token = TOKEN
    with pytest.raises(NotFound, match="does not exist, or is private"):
        make_fetcher().fetch(PLACE)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    make_fetcher().fetch(PLACE)
    assert hub.tokens == {TOKEN}
    assert not hub.token_at_blob


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"token": "another"}, AdapterError, "does not accept HF_TOKEN"),
        ({"is_gated": True}, AdapterError, "is gated"),
        ({"status": 500}, SourceUnavailable, "answers 500"),
        ({"status": 410}, AdapterError, "answers 410"),
        ({"no_commit": True}, SourceUnavailable, "which commit"),
        ({"announced": 1 << 40}, AdapterError, "over max_fetch_bytes"),
    ],
)
def test_a_refusal_is_in_own_words_and_leaves_nothing(
    hub: HubSite,
    repository: Repository,
    make_fetcher: MakeFetcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    error: type[FathomError],
    words: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in change.items():
        setattr(repository, name, value)
    with pytest.raises(error, match=words) as refusal:
        make_fetcher().fetch(PLACE)
    assert str(refusal.value).startswith("hf://org/name: ")
    assert TOKEN not in str(refusal.value)
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None
    assert cached_files(tmp_path) == []
    assert hub.paths("GET") == []


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (RemoteAdapter("hf", "org/other"), "does not exist"),
        (RemoteAdapter("hf", "org/name", revision="v9"), "no revision 'v9'"),
        (RemoteAdapter("hf", "org/name", "nowhere"), "adapter_config.json is missing"),
    ],
)
def test_what_is_not_there_is_not_found(
    repository: Repository, make_fetcher: MakeFetcher, place: RemoteAdapter, words: str
) -> None:
    with pytest.raises(NotFound, match=words):
        make_fetcher().fetch(place)


def test_a_pickle_is_named_and_never_fetched(
    hub: HubSite, repository: Repository, make_fetcher: MakeFetcher
) -> None:
    files = repository.commits[repository.revisions["main"]]
    files["adapter_model.bin"] = files.pop(WEIGHTS)
    with pytest.raises(AdapterError, match="is a pickle"):
        make_fetcher().fetch(PLACE)
    assert hub.paths("GET") == []


def test_weights_over_the_limit_are_not_begun(
    hub: HubSite, repository: Repository, make_fetcher: MakeFetcher
) -> None:
    size = len(repository.commits[repository.revisions["main"]][WEIGHTS])
    with pytest.raises(AdapterError, match=f"{size} bytes, over max_fetch_bytes, {size - 1}"):
        make_fetcher(max_weights_bytes=size - 1).fetch(PLACE)
    assert hub.paths("GET") == []
    make_fetcher(max_weights_bytes=size).fetch(PLACE)


def test_more_bytes_than_were_announced_are_not_taken(
    repository: Repository, make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    repository.more = 64 << 20
    with pytest.raises(AdapterError, match="more than was announced"):
        make_fetcher().fetch(PLACE)
    assert cached_files(tmp_path) == []


def test_weights_that_are_cut_off_leave_nothing(
    repository: Repository,
    make_fetcher: MakeFetcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client tries again five times, a second apart: here it does not wait."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    repository.cut_after = 100
    with pytest.raises(SourceUnavailable):
        make_fetcher().fetch(PLACE)
    assert cached_files(tmp_path) == []
    repository.cut_after = None
    make_fetcher().fetch(PLACE)


def test_a_fetch_that_takes_too_long_is_told_so_and_leaves_nothing(
    repository: Repository, make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    repository.held = threading.Event()
    with pytest.raises(SourceUnavailable, match=r"within fetch_timeout_s, 0\.5 seconds"):
        make_fetcher(timeout_s=0.5).fetch(PLACE)
    (thread,) = (each for each in threading.enumerate() if each.name == "fathom-fetch")
    repository.held.set()
    thread.join(30)
    assert not thread.is_alive()
    assert cached_files(tmp_path) == []


def test_offline_the_cache_is_what_the_hub_last_was(
    hub: HubSite,
    repository: Repository,
    tiny: Tiny,
    make_fetcher: MakeFetcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = make_fetcher().fetch(PLACE)
    repository.commit(files_of(tiny.adapter("b")), "main", "v2")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert make_fetcher().fetch(PLACE) == fetched
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
        make_fetcher().fetch(RemoteAdapter("hf", "org/name", revision="v2"))
    assert hub.requests == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_when_the_hub_is_down_the_cache_serves(
    repository: Repository, make_fetcher: MakeFetcher, status: int
) -> None:
    fetched = make_fetcher().fetch(PLACE)
    repository.status = status
    assert make_fetcher().fetch(PLACE) == fetched


def test_a_failed_fetch_does_not_take_the_last_good_one_away(
    hub: HubSite,
    repository: Repository,
    tiny: Tiny,
    make_fetcher: MakeFetcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client notes what a branch means before it downloads; then offline would find half of it."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    fetched = make_fetcher().fetch(PLACE)
    repository.commit(files_of(tiny.adapter("b")), "main")
    repository.cut_after = 100
    assert make_fetcher().fetch(PLACE) == fetched
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert make_fetcher().fetch(PLACE) == fetched
