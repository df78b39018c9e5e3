"""The guard of every other test sees what it is for, and the policy holds in a browser."""

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.conftest import Visit
from tests.browser.served import Site
from tests.browser.watch import Watch

ELSEWHERE = "http://127.0.0.2:9"


def policy(site: Site, page_of: Browser) -> str:
    page = page_of.new_page()
    header = page.request.get(f"{site.url}/").headers["content-security-policy"]
    page.close()
    return header


@pytest.mark.parametrize(
    ("markup", "has_policy", "problem"),
    [
        ("<script>window.ran = true</script>", True, "Content Security Policy"),
        ("<p style='color: red'>red</p>", True, "Content Security Policy"),
        (f"<img src='{ELSEWHERE}/a.png'>", True, "Content Security Policy"),
        (f"<img src='{ELSEWHERE}/a.png'>", False, f"request to {ELSEWHERE}/a.png"),
        ("<script>console.error('said')</script>", False, "error: said"),
        ("<script>throw new Error('thrown')</script>", False, "exception: thrown"),
        ("<img src='/gone.png'>", False, "404"),
        ("<p>fine</p>", True, None),
    ],
)
def test_what_must_not_happen_is_seen(
    browser: Browser, site: Site, markup: str, has_policy: bool, problem: str | None
) -> None:
    headers = {"content-type": "text/html"}
    if has_policy:
        headers["content-security-policy"] = policy(site, browser)
    page = browser.new_page()
    watch = Watch(page, site.url)
    body = f"<!doctype html><link rel=icon href=''><title>planted</title>{markup}"
    page.route(f"{site.url}/", lambda route: route.fulfill(body=body, headers=headers))
    page.goto(f"{site.url}/")
    page.wait_for_load_state("networkidle")
    if problem is None:
        watch.check()
    else:
        assert any(problem in each for each in watch.problems), watch.problems
        with pytest.raises(AssertionError):
            watch.check()
    assert page.evaluate("window.ran") is None
    page.close()


def test_an_expected_error_that_does_not_come_is_a_failure(browser: Browser, site: Site) -> None:
    page = browser.new_page()
    watch = Watch(page, site.url)
    watch.expect("status of 401")
    with pytest.raises(AssertionError):
        watch.check()
    page.close()


def test_code_of_text_does_not_run_in_the_console(visit: Visit, watches: list[Watch]) -> None:
    page = visit("live")
    expect(page.locator(".tile")).to_have_count(6)
    watches[-1].expect("TrustedScript|TrustedHTML|Content Security Policy")
    said = page.evaluate(
        """async () => {
          const tries = [
            () => eval("1"),
            () => new Function("return 1")(),
            () => (document.createElement("p").innerHTML = "<b>x</b>"),
            () => fetch("http://127.0.0.2:9/"),
          ];
          // The protocol that drives the browser may use eval itself, as long as its own call runs.
          await new Promise((resolve) => setTimeout(resolve, 50));
          const results = [];
          for (const attempt of tries) {
            try { await attempt(); results.push("ran"); } catch { results.push("refused"); }
          }
          return results;
        }"""
    )
    assert said == ["refused"] * 4


def test_a_page_that_was_loaded_works_offline(visit: Visit) -> None:
    """All that the page needs beside its server's answers came from there."""
    page = visit("compare")
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    for part in ("Adapters", "Calibration", "Live", "Compare"):
        page.get_by_role("link", name=part).click()
        page.get_by_role("heading", level=1, name=part).wait_for()
    files = {url for url in seen if "/console/" in url and not url.endswith("icon.svg")}
    assert files == set(), "every file was there from the start"
