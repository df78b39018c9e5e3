"""What a stock vLLM with the plugin answers: PEFT's tokens at every depth, or a refusal in words."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm.conftest import EXPORTED
from tests.vllm.oracle import Oracle
from tests.vllm.site import (
    BASE,
    CALIBRATED,
    LENGTH,
    MAX_LEN,
    MAX_RANK,
    NUM_LAYERS,
    Served,
    Site,
    calibrate,
    save,
)

PROMPT = [11, 22, 33, 44, 55, 66, 77, 88]
PROMPTS = [PROMPT, [401, 5, 77, 201, 90], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
DEPTHS = range(NUM_LAYERS + 1)
PATIENCE_S = 120.0
"""For what the plugin does within seconds on a machine that has nothing else to do."""


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)


def completions(vllm: Served, model: str) -> list[tuple[list[int], list[int]]]:
    """Of every prompt, asked for at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = pool.map(lambda prompt: vllm.completion(model, prompt), PROMPTS)
        return list(zip(PROMPTS, found, strict=True))


def serves_on(vllm: Served, site: Site, oracle: Oracle) -> bool:
    got = vllm.completion("b@3", PROMPT, 2)
    return oracle.agrees(site.adapter("b"), 3, PROMPT, got)


def test_the_oracle_tells_depths_apart(site: Site, oracle: Oracle) -> None:
    """Else nothing below could fail."""
    found = [oracle.completion(site.adapter("a"), depth, PROMPT, LENGTH) for depth in DEPTHS]
    assert len({tuple(tokens) for tokens in found}) == len(found)
    assert found[0] == oracle.completion(None, 0, PROMPT, LENGTH)
    for depth, tokens in zip(DEPTHS, found, strict=True):
        agreeing = [d for d in DEPTHS if oracle.agrees(site.adapter("a"), d, PROMPT, tokens)]
        assert agreeing == [depth]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_depth_gives_pefts_tokens(
    vllm: Served, site: Site, oracle: Oracle, name: str, depth: int
) -> None:
    for prompt, got in completions(vllm, f"{name}@{depth}"):
        assert len(got) == LENGTH
        assert oracle.agrees(site.adapter(name), depth, prompt, got)


@pytest.mark.parametrize("model", ["a", "a@full", "a@auto"])
def test_without_a_record_it_is_the_whole_adapter(
    vllm: Served, site: Site, oracle: Oracle, model: str
) -> None:
    got = vllm.completion(model, PROMPT)
    assert oracle.agrees(site.adapter("a"), NUM_LAYERS, PROMPT, got)


@pytest.mark.parametrize("model", ["calibrated", "calibrated@auto"])
def test_auto_is_the_depth_of_the_record(
    vllm: Served, site: Site, oracle: Oracle, model: str
) -> None:
    got = vllm.completion(model, PROMPT)
    assert oracle.agrees(site.adapter("calibrated"), CALIBRATED, PROMPT, got)
    whole = vllm.completion("calibrated@full", PROMPT)
    assert oracle.agrees(site.adapter("calibrated"), NUM_LAYERS, PROMPT, whole)
    vllm.completion(f"calibrated@{CALIBRATED}", PROMPT)
    roots = vllm.roots()
    assert roots[model] == roots[f"calibrated@{CALIBRATED}"] != roots["calibrated@full"]


def test_a_record_of_other_content_is_not_applied_and_the_log_says_so(
    vllm: Served, site: Site, oracle: Oracle
) -> None:
    got = vllm.completion("foreign@auto", PROMPT)
    assert oracle.agrees(site.adapter("foreign"), NUM_LAYERS, PROMPT, got)
    log = vllm.log.read_text()
    assert "boundary.json of adapter 'foreign' is not applied" in log
    assert "boundary.json of adapter 'calibrated' is not applied" not in log


def test_the_base_model_is_left_alone(vllm: Served, oracle: Oracle) -> None:
    for prompt, got in completions(vllm, BASE):
        assert oracle.agrees(None, 0, prompt, got)


@pytest.mark.parametrize("depth", EXPORTED)
def test_an_export_is_served_as_a_plain_adapter(
    vllm: Served, site: Site, oracle: Oracle, depth: int
) -> None:
    for prompt, got in completions(vllm, f"exported/v{depth}"):
        assert oracle.agrees(site.adapter("a"), depth, prompt, got)


def test_many_adapters_and_depths_at_once(vllm: Served, site: Site, oracle: Oracle) -> None:
    """More names than vLLM has room for, so cuts are read again while others run."""
    asked = [(name, depth) for name in ("a", "b") for depth in DEPTHS] * 2
    prompts = [[*PROMPT, 100 + place] for place in range(len(asked))]
    with ThreadPoolExecutor(len(asked)) as pool:
        models = [f"{name}@{depth}" for name, depth in asked]
        found = list(pool.map(vllm.completion, models, prompts))
    for (name, depth), prompt, got in zip(asked, prompts, found, strict=True):
        assert oracle.agrees(site.adapter(name), depth, prompt, got)


def test_an_adapter_that_is_replaced_is_another_from_then_on(
    vllm: Served, site: Site, oracle: Oracle
) -> None:
    names = ["moving@2", "moving@full", "moving"]
    before = {name: vllm.completion(name, PROMPT) for name in names}
    assert oracle.agrees(site.adapter("moving"), 2, PROMPT, before["moving@2"])
    roots = vllm.roots()

    save(site, site.adapter("moving"), 70)
    assert not oracle.agrees(site.adapter("moving"), 2, PROMPT, before["moving@2"])
    until(lambda: all(vllm.roots()[n] != roots[n] for n in names), "the new weights were not seen")
    # The same prompt: an old adapter's blocks in the prefix cache would show.
    assert oracle.agrees(site.adapter("moving"), 2, PROMPT, vllm.completion("moving@2", PROMPT))
    for name in ("moving@full", "moving"):
        got = vllm.completion(name, PROMPT)
        assert oracle.agrees(site.adapter("moving"), NUM_LAYERS, PROMPT, got)

    root = vllm.roots()["moving"]
    calibrate(site, "moving", 3)
    until(lambda: vllm.roots()["moving"] != root, "the record was not seen")
    assert oracle.agrees(site.adapter("moving"), 3, PROMPT, vllm.completion("moving", PROMPT))


def test_what_runs_ends_with_the_adapter_it_began_with(
    vllm: Served, site: Site, oracle: Oracle
) -> None:
    """Old and new lie in one batch, and other adapters want their places meanwhile."""
    shutil.copytree(site.adapter("a"), site.adapter("running"))
    for depth in range(1, NUM_LAYERS):
        vllm.completion(f"b@{depth}", PROMPT, 1)
    with ThreadPoolExecutor(4) as pool:
        model = "running@5"
        vllm.completion(model, PROMPT, 1)
        root = vllm.roots()[model]
        old = pool.submit(vllm.completion, model, PROMPT, MAX_LEN - len(PROMPT))
        save(site, site.adapter("running"), 80)
        until(lambda: vllm.roots()[model] != root, "the new weights were not seen")
        new = pool.submit(vllm.completion, model, PROMPT, LENGTH)
        others = [pool.submit(vllm.completion, f"b@{d}", PROMPT, 2) for d in range(1, NUM_LAYERS)]
        assert not old.done(), "it was over before the adapter was replaced"
        assert oracle.agrees(site.adapter("running"), 5, PROMPT, new.result())
        for depth, other in enumerate(others, start=1):
            assert oracle.agrees(site.adapter("b"), depth, PROMPT, other.result())
        assert oracle.agrees(site.adapter("a"), 5, PROMPT, old.result())
    assert model in vllm.roots()


def test_what_vllm_cannot_load_does_not_take_the_name_over(
    vllm: Served, site: Site, oracle: Oracle
) -> None:
    def num_refused() -> int:
        return vllm.log.read_text().count("'breaking@2' changed on the disk and stays as it was")

    shutil.copytree(site.adapter("a"), site.adapter("breaking"))
    vllm.completion("breaking@2", PROMPT)
    save(site, site.adapter("breaking"), 71, rank=2 * MAX_RANK)
    until(lambda: num_refused() >= 1, "the change was not refused")
    assert oracle.agrees(site.adapter("a"), 2, PROMPT, vllm.completion("breaking@2", PROMPT))
    (site.adapter("breaking") / "adapter_model.safetensors").write_bytes(b"no weights at all")
    until(lambda: num_refused() >= 2, "the change was not refused")
    assert oracle.agrees(site.adapter("a"), 2, PROMPT, vllm.completion("breaking@2", PROMPT))
    assert serves_on(vllm, site, oracle)


def test_an_adapter_that_is_deleted_is_not_found_any_more(
    vllm: Served, site: Site, oracle: Oracle
) -> None:
    shutil.copytree(site.adapter("a"), site.adapter("leaving"))
    vllm.completion("leaving@2", PROMPT)
    shutil.rmtree(site.adapter("leaving"))
    until(lambda: "leaving@2" not in vllm.roots(), "the adapter was not missed")
    status, words = vllm.error("leaving@2")
    assert status == 404
    assert "leaving@2" in words
    # And back again.
    shutil.copytree(site.adapter("a"), site.adapter("leaving"))
    assert oracle.agrees(site.adapter("a"), 2, PROMPT, vllm.completion("leaving@2", PROMPT))
    assert serves_on(vllm, site, oracle)


@pytest.mark.parametrize(
    "model",
    [
        "nobody",
        "nobody@2",
        "../outside",
        "../outside@2",
        "a/../../outside@2",
        "{root}/a@2",
        "{outside}@2",
        "leading_out",
        "leading_out@2",
        "a/@2",
        ".@2",
        "..@2",
        "@2",
        "a\n@2",
        "a\0@2",
        "a\\..\\b@2",
        "a" * 5000 + "@2",
        "a@2@2",
    ],
)
def test_what_is_no_adapter_below_the_root_is_not_found(
    vllm: Served, site: Site, oracle: Oracle, model: str
) -> None:
    status, words = vllm.error(model.format(root=site.root, outside=site.outside))
    assert status == 404
    assert "does not exist" in words
    assert serves_on(vllm, site, oracle)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("a@7", "must be from 0 to 6"),
        ("a@999999999", "must be from 0 to 6"),
        ("a@-1", "must be a number of layers"),
        ("a@deep", "must be a number of layers"),
        ("a@", "must be a number of layers"),
        ("a@1.5", "must be a number of layers"),
        ("weights_outside@2", "leads out of the root"),
        ("weights_outside", "leads out of the root"),
        ("pickle@2", "never opened"),
        ("too_wide@2", "could not be loaded"),
    ],
)
def test_what_is_wrong_is_refused_in_words(
    vllm: Served, site: Site, oracle: Oracle, model: str, why: str
) -> None:
    status, words = vllm.error(model)
    assert (status, why in words) == (400, True), words
    assert serves_on(vllm, site, oracle)


def test_what_leads_out_is_served_once_it_lies_below_the_root(
    vllm: Served, site: Site, oracle: Oracle
) -> None:
    """The control: nothing but the place of `outside` was wrong with it."""
    shutil.copytree(site.outside, site.adapter("inside"))
    got = vllm.completion("inside@2", PROMPT)
    assert oracle.agrees(site.outside, 2, PROMPT, got)


def test_the_cache_holds_whole_cuts_only(vllm: Served, site: Site) -> None:
    vllm.completion("a@2", PROMPT)
    found = [path for path in site.cache.iterdir() if not path.name.startswith(".")]
    assert found
    for path in found:
        assert {file.name for file in path.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    assert not list(site.cache.glob(".new-*"))
    assert {Path(root).parent for name, root in vllm.roots().items() if "@" in name} == {site.cache}
