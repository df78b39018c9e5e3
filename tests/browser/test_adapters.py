"""Adapters: what is loaded, loading one, a broken one's reason, and unloading."""

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Visit
from tests.browser.served import Site
from tests.browser.watch import Watch


def load(page: Page, name: str, path: str) -> None:
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_label("Path").fill(path)
    page.get_by_role("button", name="Load", exact=True).click()


def cells(page: Page, name: str) -> dict[str, str]:
    """A row's cells by what their column says."""
    row = page.get_by_role("row").filter(has_text=name)
    return {
        str(cell.get_attribute("data-label")): cell.inner_text()
        for cell in row.get_by_role("cell").all()
    }


def test_each_adapter_shows_what_it_is(visit: Visit, admin: httpx.Client, site: Site) -> None:
    body = {"model": "arithmetic", "prompt": "Problem:", "max_tokens": 4, "lora_depth": 3}
    for _ in range(2):
        assert httpx.post(f"{site.url}/v1/completions", json=body, timeout=60).status_code == 200
    page = visit("adapters")
    expect(page.get_by_role("columnheader", name="Memory")).to_be_visible()
    views = {view["name"]: view for view in admin.get("/adapters").json()["adapters"]}
    view = views["arithmetic"]
    row = cells(page, "arithmetic")
    assert row["Rank"] == "8"
    assert row["Modules"] == "q k v o gate up down"
    assert row["Memory"] == "912 KiB"
    assert row["Where"] == "device"
    assert row["Depth of auto"] == "full, not calibrated"
    assert row["Requests"] == str(view["num_requests"])
    layers = view["layer_applications"]
    share = layers["skipped"] / (layers["applied"] + layers["skipped"])
    assert row["LoRA skipped"] == f"{100 * share:.0f} %"
    assert share > 0
    ladder = page.get_by_role("row").filter(has_text="arithmetic").get_by_role("img")
    expect(ladder.locator(".rung.on")).to_have_count(12)


def test_a_broken_adapter_says_why_and_a_good_one_comes_and_goes(
    visit: Visit, watches: list[Watch], admin: httpx.Client
) -> None:
    page = visit("adapters")
    watches[-1].expect("status of 400")
    load(page, "torn", "broken")
    said = page.get_by_role("alert")
    expect(said).to_contain_text("Not loaded.")
    reason = admin.put("/adapters/torn", json={"path": "broken"}).json()["error"]["message"]
    expect(said).to_contain_text(reason[1:])
    assert "it is truncated" in reason

    load(page, "second", "second")
    expect(page.get_by_text("second is loaded: rank 8.")).to_be_visible()
    expect(page.get_by_role("row")).to_have_count(5)
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_role("option", name="second")).to_be_attached()

    page.get_by_role("link", name="Adapters").click()
    page.get_by_role("button", name="Unload second").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Unload second").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(page.get_by_role("row")).to_have_count(4)
    assert "second" not in [each["name"] for each in admin.get("/adapters").json()["adapters"]]


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [("pirate", "second", "pirate"), ("x", "../out", ".."), ("x", "nothing", "nothing")],
)
def test_what_cannot_be_loaded_is_told_in_the_servers_words(
    visit: Visit, watches: list[Watch], name: str, path: str, words: str
) -> None:
    page = visit("adapters")
    watches[-1].expect("status of 4")
    load(page, name, path)
    expect(page.get_by_role("alert")).to_contain_text(words)
