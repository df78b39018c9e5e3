"""What must not happen on the page: an error on its console, an exception, a request to anybody else.

A test that provokes one says so beforehand, and it then has to come: an allowance that nothing used hides
the day on which something else would.
"""

import re
from urllib.parse import urlsplit

from playwright.sync_api import Page

INTERNAL = ("blob", "data")


class Watch:
    """Follows a page from before its first request."""

    def __init__(self, page: Page, origin: str) -> None:
        self._origin = origin
        self._expected: dict[str, int] = {}
        self.problems: list[str] = []
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("request", lambda request: self._see(request.url))

    def expect(self, pattern: str) -> None:
        """An error on the console that this test provokes, once or more."""
        self._expected[pattern] = 0

    def check(self) -> None:
        """At the end of a test."""
        assert self.problems == []
        assert [each for each, times in self._expected.items() if not times] == []

    def _note(self, kind: str, text: str) -> None:
        if kind not in ("error", "warning"):
            return
        for pattern in self._expected:
            if re.search(pattern, text):
                self._expected[pattern] += 1
                return
        self.problems.append(f"{kind}: {text}")

    def _see(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in INTERNAL and f"{parts.scheme}://{parts.netloc}" != self._origin:
            self.problems.append(f"request to {url}")
