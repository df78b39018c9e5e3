"""Keys: typed, kept for the tab, told right from wrong, and what is hidden without them."""

from pathlib import Path

import httpx
from playwright.sync_api import expect

from tests.browser.conftest import Visit
from tests.browser.served import ADMIN_KEY, API_KEY, make_site, serve
from tests.browser.watch import Watch


def test_without_an_admin_key_there_are_no_admin_parts(visit: Visit) -> None:
    page = visit("adapters", admin_key=None)
    expect(page.get_by_role("row")).to_have_count(4)
    parts = page.get_by_role("navigation").get_by_role("link")
    assert parts.all_inner_texts() == ["Compare", "Adapters", "Live"]
    expect(page.get_by_role("button", name="Unload")).to_have_count(0)
    expect(page.get_by_text("Load an adapter")).to_have_count(0)
    page.goto(page.url.replace("adapters", "calibration/pirate"))
    expect(page.get_by_text("This part is for who operates the server")).to_be_visible()


def test_a_wrong_admin_key_is_refused_and_a_right_one_opens(
    visit: Visit, watches: list[Watch]
) -> None:
    page = visit("compare", admin_key=None)
    watches[-1].expect("status of 401")
    page.get_by_role("button", name="Keys").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Admin key").fill("wrong")
    dialog.get_by_role("button", name="Use these keys").click()
    expect(dialog.get_by_role("alert")).to_contain_text("does not know this admin key")
    dialog.get_by_label("Admin key").fill(ADMIN_KEY)
    dialog.get_by_role("button", name="Use these keys").click()
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("link", name="Calibration")).to_be_visible()


def test_a_server_that_wants_a_key_gets_it_as_a_bearer_from_this_tab_alone(
    visit: Visit, watches: list[Watch], tmp_path: Path, log: Path
) -> None:
    site = make_site(tmp_path)
    with serve(site, log, "--api-key", API_KEY, "--admin-key", ADMIN_KEY):
        page = visit("compare", url=site.url, admin_key=None)
        # Nothing was refused so far: the page knows that a key is wanted before it asks.
        expect(page.get_by_text("This server asks for an API key")).to_be_visible()
        watches[-1].expect("status of 401")
        page.get_by_role("button", name="Type a key").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use these keys").click()
        expect(dialog.get_by_role("alert")).to_contain_text("does not know this API key")
        dialog.get_by_label("API key").fill(API_KEY)
        with page.expect_request("**/v1/models") as asked:
            dialog.get_by_role("button", name="Use these keys").click()
        assert asked.value.headers["authorization"] == f"Bearer {API_KEY}"
        expect(page.get_by_role("button", name="Run")).to_be_visible()
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert page.evaluate("Object.values(sessionStorage)") == [API_KEY]
        assert API_KEY not in page.url
        page.reload()
        expect(page.get_by_role("button", name="Run")).to_be_visible()

        other = visit("compare", url=site.url, admin_key=None)
        expect(other.get_by_text("This server asks for an API key")).to_be_visible()

        page.get_by_role("button", name="Keys").click()
        dialog.get_by_label("API key").fill("")
        dialog.get_by_role("button", name="Use these keys").click()
        page.keyboard.press("Escape")
        expect(page.get_by_text("This server asks for an API key")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        for each in (page, other):
            each.context.close()  # before the server is gone, which it would say


def test_a_key_of_a_shallow_grant_is_offered_no_depth_beyond(
    visit: Visit, tmp_path: Path, log: Path
) -> None:
    site = make_site(tmp_path)
    with serve(site, log, "--admin-key", ADMIN_KEY):
        body = {"name": "ada", "adapters": ["pirate", "fathom-demo"], "max_depth": 4}
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        made = httpx.post(f"{site.url}/admin/keys", json=body, headers=headers).json()
        page = visit("compare", url=site.url, admin_key=None, api_key=made["key"])
        expect(page.locator(".lane")).to_have_count(2)
        slider = page.get_by_role("slider", name="Depth of this answer")
        slider.focus()
        page.keyboard.press("End")
        expect(slider).to_have_attribute("aria-valuetext", "depth 4 of 12")
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_text("Beside depth 4")).to_be_visible()
        assert "arithmetic" not in page.content()
        page.context.close()  # before the server is gone, which it would say
