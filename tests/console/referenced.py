"""What a page's files refer to, and what in them a strict policy or an offline machine would not allow.

Reads text, not the language: it knows how this page's files are written, and is shown in its tests to see
what it is for.
"""

import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import PurePosixPath

NAMESPACES = re.compile(r"https?://www\.w3\.org/(?:2000/svg|1999/xhtml|1998/Math/MathML)")
IMPORT = re.compile(r"""(?:\bfrom|\bimport)\s*\(?["']([^"']+)["']""")
EVALUATES = re.compile(r"\beval\(|new Function\b|\bFunction\(|setTimeout\(\s*[\"'`]|\binnerHTML\b")
MARKUP = re.compile(r"\binsertAdjacentHTML\b|\bdocument\.write\b|\bouterHTML\b")


class _Page(HTMLParser):
    """Addresses that a page loads, and the parts of it that `script-src 'self'` does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [given[name] or "" for name in ("src", "href") if name in given]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(f"<{tag}>")


def read_page(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    page.close()
    return page


def missing(files: Mapping[str, str]) -> set[tuple[str, str]]:
    """`(file, address)` for every import of a module that is not among `files`."""
    return {
        (name, address)
        for name, text in files.items()
        if name.endswith((".js", ".mjs"))
        for address in IMPORT.findall(text)
        if not address.startswith("./") or _beside(name, address) not in files
    }


def unused(files: Mapping[str, str], first: str) -> set[str]:
    """Modules that nothing imports, from the one where the page starts."""
    found, new = {first}, [first]
    while new:
        name = new.pop()
        for address in IMPORT.findall(files[name]):
            if (target := _beside(name, address)) not in found and target in files:
                found.add(target)
                new.append(target)
    return {name for name in files if name.endswith((".js", ".mjs"))} - found


def forbidden(files: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """`(file, text)` for what names another host, or makes code or markup of strings."""
    for name, text in files.items():
        rest = NAMESPACES.sub("", text)
        for pattern in (
            r"https?://[^\s\"'`$]+",
            r"\burl\((?!#)[^)]*\)",
            r"@import\b",
            r"[\"']//\w[^\"']*",
        ):
            yield from ((name, found) for found in re.findall(pattern, rest))
        if not name.startswith("vendor/"):
            for pattern in (EVALUATES, MARKUP):
                yield from ((name, found) for found in pattern.findall(rest))


def _beside(name: str, address: str) -> str:
    return (PurePosixPath(name).parent / address).as_posix()
