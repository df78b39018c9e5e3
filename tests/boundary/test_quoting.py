"""Strangers' text, held against a Markdown parser of the CommonMark specification."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from boundary.report.quoting import code_span, fenced, printable, shortened

PLAIN = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")))
TICKS = st.text("`~|\\ a\n#", max_size=30)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("é 海 👍", "é 海 👍"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\r\nb\t", "a\\r\\nb\\t"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("\ufffe", "\\ufffe"),
        ("👩\u200d🚀", "👩\u200d🚀"),  # one emoji, made of two
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_what_is_shown_can_be_encoded_and_moves_no_cursor(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert not any(ord(character) < 32 or ord(character) == 127 for character in shown)


def test_a_long_text_says_that_it_goes_on() -> None:
    assert shortened("abcd", 4) == "abcd"
    assert shortened("abcde", 4) == "abc…"


@given(st.one_of(TICKS, PLAIN))
@example("```\n# no heading\n```")
@example("````")
@example("\r# no heading")
@example("~~~")
@settings(deadline=None)
def test_a_fenced_text_is_one_block_that_holds_it(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"before\n\n{fenced(text)}\n\nafter")
    kinds = [token.type for token in tokens if token.level == 0]
    paragraph = ["paragraph_open", "paragraph_close"]
    assert kinds == [*paragraph, "fence", *paragraph]
    (fence,) = [token for token in tokens if token.type == "fence"]
    assert fence.content == printable(text, keep="\n\t") + "\n"
    assert fence.info == "text"


def test_a_fence_of_three_would_be_left() -> None:
    """The negative control: what `fenced` guards against."""
    text = "```\n# a heading of somebody else's\n```"
    tokens = MarkdownIt("commonmark").parse(f"```text\n{text}\n```")
    assert "heading_open" in [token.type for token in tokens]


@given(st.one_of(TICKS, PLAIN))
@example("`a")
@example("a``")
@example(" a ")
@example("a|b")
@example("\\|")
@settings(deadline=None)
def test_a_code_span_in_a_table_is_one_cell_that_holds_it(text: str) -> None:
    page = f"| one | two |\n| --- | --- |\n| {code_span(text)} | x |"
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    cells = [tokens[index + 1] for index, token in enumerate(tokens) if token.type == "td_open"]
    assert len(cells) == 2
    assert cells[1].content == "x"
    (child,) = cells[0].children or []
    if printable(text).strip():
        assert (child.type, child.content) == ("code_inline", printable(text))
    else:
        assert (child.type, child.content) == ("text", "(empty)")


@given(st.one_of(TICKS, PLAIN))
@settings(deadline=None)
def test_a_code_span_in_a_heading_interprets_nothing(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"# About {code_span(text)}")
    assert [token.type for token in tokens] == ["heading_open", "inline", "heading_close"]
    assert {child.type for child in tokens[1].children or []} <= {"text", "code_inline"}
