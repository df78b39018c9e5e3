"""The pictures of the console in server/docs/console.md, taken anew: `python -m tests.browser.take`.

A server with the demo, a calibration of each kind of verdict, and some traffic to look at.
"""

import io
import sys
import tempfile
import threading
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from server import demo
from tests.browser.conftest import launch
from tests.browser.served import ADMIN_KEY, Site, make_site, serve

FOLDER = Path(__file__).parent / "screenshots"
WIDE = {"width": 1240, "height": 820}
PHONE = {"width": 390, "height": 844}
QUALITY = 82
WAIT_MS = 60_000
TRAFFIC = [("pirate", 12), ("pirate", 9), ("pirate", 9), ("restaurant", 11), ("arithmetic", 6)]


def calibrate(admin: httpx.Client, adapter: str, num_samples: int, share: float) -> None:
    lines = demo.valid_path(adapter).read_text(encoding="utf-8").splitlines()[:num_samples]
    body = {"dataset": {"jsonl": "\n".join(lines)}, "tolerance": {"share_of_gain": share}}
    job = admin.post(f"/adapters/{adapter}/recalibrate", json=body).json()["job"]
    admin.get(f"/jobs/{job['id']}/events")  # ends with the job


def keep_asking(site: Site, is_over: threading.Event) -> None:
    """A few clients of different adapters and depths, until the pictures are taken."""
    number = 0
    while not is_over.wait(0.05):
        model, depth = TRAFFIC[number % len(TRAFFIC)]
        body = {
            "model": model,
            "prompt": f"Number {number}:",
            "max_tokens": 40,
            "lora_depth": depth,
        }
        httpx.post(f"{site.url}/v1/completions", json=body, timeout=60)
        number += 1


def open_page(browser: Browser, site: Site, part: str, size: dict[str, int], scheme: str) -> Page:
    context = browser.new_context(
        viewport=size,  # type: ignore[arg-type]
        color_scheme=scheme,  # type: ignore[arg-type]
        device_scale_factor=1.5,
    )
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.add_init_script(f"sessionStorage.setItem('fathom-admin-key', {ADMIN_KEY!r})")
    page.goto(f"{site.url}/#/{part}")
    return page


def take(page: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").save(FOLDER / f"{name}.webp", quality=QUALITY, method=6)
    sys.stdout.write(f"{name}: {(FOLDER / f'{name}.webp').stat().st_size // 1000} kB\n")
    page.context.close()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        site = make_site(Path(directory))
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        with (
            serve(site, Path(directory) / "log", "--admin-key", ADMIN_KEY),
            httpx.Client(base_url=f"{site.url}/admin", headers=headers, timeout=600) as admin,
        ):
            calibrate(admin, "pirate", 40, 0.0)
            calibrate(admin, "pirate", 64, 0.25)
            calibrate(admin, "restaurant", 40, 0.1)
            browser = launch(playwright)
            for name, size, scheme in (
                ("compare-light", WIDE, "light"),
                ("compare-phone", PHONE, "light"),
            ):
                page = open_page(browser, site, "compare/pirate", size, scheme)
                page.get_by_role("button", name="Run").click()
                page.get_by_text("Beside depth").wait_for()
                page.locator(".lane").last.locator(".token").nth(4).hover()
                page.evaluate("scrollTo(0, 0)")
                take(page, name)
            page = open_page(browser, site, "calibration/pirate", WIDE, "dark")
            page.locator(".curve .plot").wait_for()
            take(page, "calibration-dark")
            is_over = threading.Event()
            client = threading.Thread(target=keep_asking, args=(site, is_over))
            client.start()
            try:
                page = open_page(browser, site, "live", WIDE, "light")
                page.wait_for_timeout(40_000)
                take(page, "live-light")
                take(open_adapters(browser, site), "adapters-dark")
            finally:
                is_over.set()
                client.join()
            browser.close()


def open_adapters(browser: Browser, site: Site) -> Page:
    page = open_page(browser, site, "adapters", WIDE | {"height": 460}, "dark")
    page.get_by_role("columnheader", name="Memory").wait_for()
    return page


if __name__ == "__main__":
    main()
