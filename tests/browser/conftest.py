"""A server with the demo, Debian's Chromium, and a page that is watched.

`make test-console` runs these tests, and fails where there is no Chromium: nothing here is skipped.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from tests.browser.served import ADMIN_KEY, Site, make_site, serve
from tests.browser.watch import Watch

Visit = Callable[..., Page]

WAIT_MS = 60_000
"""Machines that run tests are busy: what is waited for is there long before, or never."""
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Where it is; CHROMIUM names another."""
    named = os.environ.get("CHROMIUM")
    found = [named] if named else [path for name in NAMES if (path := shutil.which(name))]
    assert found, "there is no Chromium: on Debian, apt install chromium; or set CHROMIUM"
    return found[0]


def launch(playwright: Playwright) -> Browser:
    # Chromium has no sandbox for root, who builds in containers; it sees this server alone.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    return playwright.chromium.launch(executable_path=chromium(), args=arguments)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Of a server that has the demo, an admin key and no API key."""
    directory = tmp_path_factory.mktemp("site")
    site = make_site(directory)
    with serve(site, directory / "log", "--admin-key", ADMIN_KEY):
        yield site
    assert "Traceback" not in (directory / "log").read_text(encoding="utf-8")


@pytest.fixture
def admin(site: Site) -> Iterator[httpx.Client]:
    """The operator without a browser."""
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=f"{site.url}/admin", headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def watches() -> list[Watch]:
    """Of every page that a test visits."""
    return []


@pytest.fixture
def visit(browser: Browser, site: Site, watches: list[Watch]) -> Iterator[Visit]:
    """`visit(part, admin_key=..., **context)` -> a page that is watched."""
    contexts = []

    def open_page(
        part: str = "",
        *,
        url: str | None = None,
        api_key: str | None = None,
        admin_key: str | None = ADMIN_KEY,
        **options: Any,
    ) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        origin = url or site.url
        watches.append(Watch(page, origin))
        keys = {"fathom-api-key": api_key, "fathom-admin-key": admin_key}
        typed = {name: value for name, value in keys.items() if value is not None}
        # As if they had been typed in this tab before its first load.
        page.add_init_script(
            "if (!sessionStorage.length) Object.assign(sessionStorage, " + json.dumps(typed) + ")"
        )
        page.goto(f"{origin}/#/{part}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    for watch in watches:
        watch.check()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"
