"""Every broken or hostile adapter and path is refused with its reason, and the server serves on.

The real engine, over HTTP, by each door: loading by path on both routes, and asking for what lies
under the root. An answer is compared after each case with what it was before the first.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.containment.corpus import NAMES, OUTSIDE, PATHS
from tests.containment.served import ADMIN_KEY, API_KEY, WatchedEngine, served
from tests.model import hostile
from tests.model.peft_checkpoints import build_base, save_adapter
from tests.tiny import load_tiny

AS_ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
WISH = {"prompt": [3, 4, 5], "max_tokens": 4, "temperature": 0}


class Site(NamedTuple):
    http: httpx.Client
    engine: WatchedEngine
    root: Path
    good: Path


def save_model(directory: Path) -> Path:
    """The base of `hostile`'s checkpoints, with a tokenizer of its forty tokens."""
    build_base("llama").save_pretrained(directory)
    vocab = {f"t{i}": i for i in range(37)} | {"<pad>": 37, "<bos>": 38, "<eos>": 39}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        directory
    )
    return directory


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    here = tmp_path_factory.mktemp("site")
    root = here / "root"
    good = root / "good"
    save_adapter("llama", good, target_modules=["q_proj"])
    for outside in (here / OUTSIDE, Path(f"{root}-{OUTSIDE}")):
        shutil.copytree(good, outside)
    tiny = load_tiny(save_model(here / "model"), root)
    with (
        served(tiny, here, adapter_root=root, max_lora_rank=256) as (url, engine),
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield Site(http, engine, root, good)
        engine.assert_invariants()


@pytest.fixture
def unharmed(site: Site) -> Iterator[None]:
    """The same adapters are there afterwards, and the good one writes what it wrote."""
    before = state(site)
    yield
    assert state(site) == before


def state(site: Site) -> tuple[Any, ...]:
    answer = ask(site, "good")
    assert answer.status_code == 200, answer.text
    cards = site.http.get("/v1/models", headers={"authorization": f"Bearer {API_KEY}"}).json()
    return answer.json()["choices"][0]["text"], [card["id"] for card in cards["data"]]


def ask(site: Site, model: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {API_KEY}"}
    return site.http.post("/v1/completions", json=WISH | {"model": model}, headers=headers)


def load(site: Site, name: str, path: str) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path}
    return site.http.post("/v1/load_lora_adapter", json=body, headers=AS_ADMIN)


def put(site: Site, name: str, path: str) -> httpx.Response:
    return site.http.put(f"/admin/adapters/{name}", json={"path": path}, headers=AS_ADMIN)


def assert_refused(response: httpx.Response, status: int, words: tuple[str, ...]) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert all(word in error["message"] for word in words), error
    assert error["param"]


def test_the_corpus_is_large() -> None:
    assert len(hostile.CASES) + len(PATHS) + len(NAMES) >= 60
    assert len(PATHS) + len(NAMES) >= 50


@pytest.mark.parametrize("case", hostile.CASES)
def test_a_hostile_checkpoint_is_refused_by_every_door(
    site: Site, unharmed: None, case: str
) -> None:
    spoil, culprits = hostile.CASES[case]
    name = f"case-{list(hostile.CASES).index(case)}"
    path = Path(shutil.copytree(site.good, site.root / name))
    spoil(path)
    for response in (load(site, "bad", name), put(site, "bad", str(path))):
        # A link out of the root is refused as such, before it is asked what lies behind it.
        words = ("leads out",) if "device" in case else culprits
        error = response.json()["error"]
        assert response.status_code == 400, response.text
        assert all(word in error["message"] for word in words), error
    asked = ask(site, name)
    is_listed = (path / hostile.CONFIG).is_symlink() or (path / hostile.CONFIG).exists()
    assert asked.status_code == (400 if is_listed else 404), asked.text


@pytest.mark.parametrize("case", PATHS)
def test_a_hostile_path_is_refused_by_both_routes(site: Site, unharmed: None, case: str) -> None:
    make, status, words = PATHS[case]
    path = make(site.root)
    assert_refused(load(site, "bad", path), status, words)
    assert_refused(put(site, "bad", path), status, words)
    if "/" not in path:
        assert ask(site, path).status_code in (400, 404)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_is_refused(site: Site, unharmed: None, name: str) -> None:
    assert_refused(load(site, name, "good"), 400, NAMES[name])
    assert ask(site, name).status_code in (400, 404)


def test_what_lies_outside_of_the_root_is_good_where_it_may_be_reached(site: Site) -> None:
    """The control: the very files that no path reached are an adapter like any other."""
    shutil.copytree(site.root.parent / OUTSIDE, site.root / "inside")
    for path in ("inside", f"{site.root}/inside", "./inside"):
        response = load(site, "fine", path)
        assert response.status_code == 200, response.text
        assert ask(site, "fine").status_code == 200
        response = site.http.delete("/admin/adapters/fine", headers=AS_ADMIN)
        assert response.status_code == 200


def test_links_below_the_root_are_followed(site: Site) -> None:
    """As a hub's cache has them: files that are links to blobs, folders that are links to versions."""
    blobs = site.root / "blobs"
    blobs.mkdir()
    snapshot = Path(shutil.copytree(site.good, site.root / "snapshots" / "first"))
    for name in (hostile.CONFIG, hostile.WEIGHTS):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (site.root / "current").symlink_to("snapshots/first")
    assert ask(site, "current").status_code == 200
    assert load(site, "pinned", "snapshots/first").status_code == 200
    for name in ("current", "pinned"):
        assert site.http.delete(f"/admin/adapters/{name}", headers=AS_ADMIN).status_code == 200


def test_a_record_that_lies_elsewhere_is_not_read(site: Site) -> None:
    path = Path(shutil.copytree(site.good, site.root / "recorded"))
    (path / "boundary.json").symlink_to("/etc/passwd")
    response = put(site, "recorded", "recorded")
    assert response.status_code == 200, response.text
    assert "leads out" in response.json()["refused_record"]
    assert site.http.delete("/admin/adapters/recorded", headers=AS_ADMIN).status_code == 200


def test_an_adapter_that_becomes_a_link_out_is_not_read_again(site: Site) -> None:
    """It was loaded and dropped from host memory; meanwhile somebody changed what lies there."""
    path = Path(shutil.copytree(site.good, site.root / "changing"))
    assert load(site, "changing", "changing").status_code == 200
    site.engine.core.registry._loaded.pop("changing")
    (path / hostile.WEIGHTS).unlink()
    (path / hostile.WEIGHTS).symlink_to(site.root.parent / OUTSIDE / hostile.WEIGHTS)
    assert_refused_message = ask(site, "changing")
    assert assert_refused_message.status_code == 400
    assert "leads out" in assert_refused_message.text
    assert site.http.delete("/admin/adapters/changing", headers=AS_ADMIN).status_code == 200
