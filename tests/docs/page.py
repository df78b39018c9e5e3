"""A page of the documents as its blocks: which are run, which are only shown, and which are not run and why.

    ```sh, ```python      run by a test, in order, in one working directory
    <!-- not run: why -->  right above such a block: it is not run, for the reason given
    <!-- not run: why; instead: command -->   nor is it, but this command stands in for it
    ```text, ```yaml ...  shown

A block in no language, in an unknown one, and a mark that marks nothing are mistakes of the page.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]

RUN = ("sh", "python")
SHOWN = ("text", "json", "yaml", "toml", "mermaid")

_MARK = re.compile(r"<!-- not run: (\S.*?)(?:;\s+instead: (\S.*?))? -->\n?", re.DOTALL)


class PageError(ValueError):
    """A page whose blocks cannot be told apart."""


@dataclass(frozen=True)
class Block:
    """One fenced block that a reader is to type."""

    page: str
    """Its path from the checkout's root."""
    line: int
    """Of its first line of code, from 1."""
    language: str
    code: str
    not_run: str | None
    """Why it is not run, in the page's own words."""
    instead: str | None = None
    """A shell command that is run in its place."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages(root: Path = ROOT) -> list[str]:
    """Every page that a user is sent to, by its path from the root."""
    found = [path for path in root.glob("*.md") if path.name != "CHANGELOG.md"]
    for folder in ("server/docs", "server/demo", "docker", "deploy"):
        found += (root / folder).rglob("*.md")
    return sorted(path.relative_to(root).as_posix() for path in found)


def read(page: str, root: Path = ROOT) -> list[Token]:
    """A page as CommonMark's tokens, tables included."""
    return MarkdownIt("commonmark").enable("table").parse((root / page).read_text(encoding="utf-8"))


def blocks(page: str, root: Path = ROOT) -> list[Block]:
    """The blocks that are run or marked, in order. Raises PageError."""
    return list(_blocks(page, read(page, root)))


def _blocks(page: str, tokens: list[Token]) -> Iterator[Block]:
    mark: tuple[int, re.Match[str]] | None = None
    for token in tokens:
        if token.map is None:
            continue
        first, end = token.map
        if mark is not None and (token.type != "fence" or mark[0] != first):
            raise PageError(f"{page}:{mark[0]}: 'not run' is not right above a block")
        if token.type == "code_block":
            raise PageError(f"{page}:{first + 1}: indented code has no language: fence it")
        if token.type == "html_block" and "not run" in token.content:
            match = _MARK.fullmatch(token.content)
            if match is None:
                raise PageError(f"{page}:{first + 1}: should be '<!-- not run: the reason -->'")
            mark = (end, match)
        if token.type == "fence":
            language = token.info.strip()
            if language in RUN:
                reason, instead = mark[1].groups() if mark else (None, None)
                yield Block(page, first + 2, language, token.content, reason, instead)
            elif language not in SHOWN:
                raise PageError(f"{page}:{first + 1}: a block in {language or 'no language'}")
            elif mark is not None:
                raise PageError(f"{page}:{mark[0]}: 'not run' marks a block that is only shown")
            mark = None
    if mark is not None:
        raise PageError(f"{page}:{mark[0]}: 'not run' is not right above a block")
