"""Strangers' text where it is shown: without control of a terminal, an SVG or a Markdown page.

Names of adapters, prompts and what models generate can hold anything. Used by the reports.
"""

import re

_JOINERS = "\u200c\u200d"  # not printable, but words of many scripts and emoji need them


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with what cannot be seen written out, such as `\x1b` or `\u202e`.

    That covers line breaks, terminal and bidirectional controls, what XML forbids, and lone
    surrogates, which no encoding takes; except the characters in `keep`.
    """
    return "".join(
        character
        if character.isprintable() or character in _JOINERS or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shortened(text: str, max_chars: int) -> str:
    """The start of a longer text, with a mark that it goes on."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}\N{HORIZONTAL ELLIPSIS}"


def code_span(text: str) -> str:
    """Text within a line of Markdown, also of a table, as code of which nothing is interpreted."""
    text = printable(text)
    if not text.strip():
        return "(empty)"
    ticks = "`" * (_longest_run_of_backticks(text) + 1)
    space = " " if text[0] in "` " or text[-1] in "` " else ""  # one on each side is taken off
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|")


def fenced(text: str) -> str:
    """Text as a Markdown block, by a fence longer than any run of backticks in it."""
    text = printable(text.replace("\r\n", "\n"), keep="\n\t")
    fence = "`" * max(3, _longest_run_of_backticks(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
