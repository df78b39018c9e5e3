"""Everybody can use it: no serious violation of axe's rules, keys reach everything, phones fit it."""

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import Visit
from tests.browser.served import Site

PARTS = ("compare", "adapters", "calibration/pirate", "live")
SERIOUS = ("serious", "critical")
PHONE = {"width": 360, "height": 740}


def violations(page: Page) -> list[str]:
    """What axe finds serious, with the elements."""
    found = Axe().run(page).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:200]} {node['failureSummary'][:200]}"
        for rule in found
        if rule["impact"] in SERIOUS
        for node in rule["nodes"]
    ]


@pytest.fixture(scope="module")
def recorded(site: Site) -> None:
    """A record with a curve, so that there is something to look at."""
    from tests.browser.served import ADMIN_KEY
    from tests.browser.test_calibration import FEW, samples

    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=f"{site.url}/admin", headers=headers, timeout=120) as admin:
        body = {
            "dataset": {"jsonl": "\n".join(samples("pirate", FEW))},
            "tolerance": {"share_of_gain": 0.5},
        }
        job = admin.post("/adapters/pirate/recalibrate", json=body).json()["job"]
        assert "done" in admin.get(f"/jobs/{job['id']}/events").text


def fill(page: Page, part: str) -> None:
    """Every part in the state in which it shows most."""
    if part == "compare":
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_text("Beside depth")).to_be_visible()
        page.locator(".lane .token").nth(1).hover()
    elif part == "adapters":
        expect(page.get_by_role("row")).to_have_count(4)
    elif part == "live":
        expect(page.locator(".tile")).to_have_count(6)
    else:
        expect(page.locator(".curve .plot")).to_be_visible()
        page.get_by_text("Every depth in figures").click()
        page.get_by_text("Set a depth by hand").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("part", PARTS)
def test_no_serious_violation(visit: Visit, recorded: None, part: str, scheme: str) -> None:
    page = visit(part, color_scheme=scheme)
    fill(page, part)
    assert violations(page) == []
    page.get_by_role("button", name="Keys").click()
    assert violations(page) == []


def test_violations_are_found(visit: Visit) -> None:
    page = visit("live")
    expect(page.locator(".tile")).to_have_count(6)
    page.evaluate(
        """() => {
          const picture = document.createElement("img");
          const pale = document.createElement("p");
          pale.textContent = "hardly there";
          pale.style.color = "#eee";
          pale.style.background = "#fff";
          document.querySelector("main").append(picture, pale);
        }"""
    )
    found = " ".join(violations(page))
    assert "image-alt" in found
    assert "color-contrast" in found


@pytest.mark.parametrize("part", PARTS)
def test_a_phone_has_no_sideways_scroll(visit: Visit, recorded: None, part: str) -> None:
    page = visit(part, viewport=PHONE, has_touch=True, is_mobile=True)
    fill(page, part)
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes == [PHONE["width"]] * 2
    assert violations(page) == []


def test_keys_alone_reach_every_part_and_the_content(visit: Visit) -> None:
    page = visit("compare")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert reached == ["Compare", "Adapters", "Calibration", "Live"]
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(6)
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Keys")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_label("API key")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Keys")).to_be_focused()


def test_motion_and_titles(visit: Visit) -> None:
    page = visit("compare", reduced_motion="reduce")
    expect(page).to_have_title("Compare · Fathom")
    page.get_by_role("link", name="Live").click()
    expect(page).to_have_title("Live · Fathom")
    expect(page.get_by_role("link", name="Live")).to_have_attribute("aria-current", "page")
