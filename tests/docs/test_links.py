"""Every link of every page leads somewhere: to a file that is there, and to a heading in it."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from tests.docs.page import ROOT, pages, read


def links(page: str, root: Path = ROOT) -> Iterator[str]:
    """What a page links to and the pictures that it shows."""
    for token in read(page, root):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield str(target)


@cache
def anchors(page: str, root: Path = ROOT) -> set[str]:
    """Headings of a page as forges name them."""
    found: set[str] = set()
    tokens = read(page, root)
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found


def broken(page: str, root: Path = ROOT) -> list[str]:
    """Links of a page that lead nowhere, but those to other sites, which are not asked."""
    found = []
    for link in links(page, root):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((root / page).parent / path if path else root / page).resolve()
        is_here = target.exists() and target.is_relative_to(root.resolve())
        if not is_here or (anchor and anchor not in anchors(str(target.relative_to(root)), root)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", [*pages(), "CHANGELOG.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    assert broken(page) == []


def test_a_page_that_is_nowhere_in_the_index_is_missed() -> None:
    linked = {link.partition("#")[0] for link in links("README.md")}
    assert set(pages()) - {"README.md", "deploy/README.md"} <= linked


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `heading`, two\n")
    (tmp_path / "page.md").write_text(
        "[a](there.md) [b](there.md#a-heading-two) [c](https://example.org)\n\n"
        "[d](gone.md) [e](there.md#gone) ![f](gone.svg) [g](#gone) [h](../outside.md)\n"
    )
    (tmp_path.parent / "outside.md").touch()
    wrong = ["gone.md", "there.md#gone", "gone.svg", "#gone", "../outside.md"]
    assert broken("page.md", tmp_path) == wrong
