"""Every command and every line of Python in the documents is run, or says why not.

A page is one session: its blocks in order, one directory, one home. What is marked as not run is still
looked at: commands, flags, make targets and modules have to be there.
"""

from pathlib import Path

import pytest

from tests.docs.command_lines import problems
from tests.docs.page import PageError, blocks, pages
from tests.docs.session import run_page

# Of a server's start and a few answers each; the others are slow, and run in `make test-all`.
QUICK = ("README.md",)


def does_something(page: str) -> bool:
    """Whether there is something to run; a page that cannot be read is, so that its test says why."""
    try:
        return any(block.not_run is None or block.instead for block in blocks(page))
    except PageError:
        return True


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page in QUICK else pytest.mark.slow)
        for page in pages()
        if does_something(page)
    ],
)
def test_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    run_page(blocks(page), tmp_path)


@pytest.mark.parametrize("page", pages())
def test_its_commands_and_flags_are_there(page: str) -> None:
    wrong = {
        str(b): found for b in blocks(page) if b.language == "sh" and (found := problems(b.code))
    }
    assert wrong == {}
