"""Every command and every line of Python in the documents is run, or says why not.

A page is one session: its blocks in order, one directory, one home. What is marked as not run is still
looked at: commands, flags, make targets and modules have to be there.
"""

import json
import re
from pathlib import Path

import pytest

from server.config import VLLM_PREFIX, Settings, variable
from server.vllm.settings import ResolverSettings
from tests.docs.command_lines import problems
from tests.docs.page import ROOT, PageError, blocks, pages
from tests.docs.session import run_page

# Of a server's start and a few answers each; the others are slow, and run in `make test-all`.
QUICK = ("README.md",)

# A file of settings, the device of GPU tests, and what Kubernetes sets for a Service of that name.
OTHER_VARIABLES = {"FATHOM_CONFIG", "FATHOM_TEST_DEVICE", "FATHOM_SERVICE_HOST"}

# Errors that a page is about, as the server answers them; any other is a mistake of the page.
REFUSALS = {"server/docs/operations.md": ["depth_not_allowed", "model_not_allowed"]}


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
    output = run_page(blocks(page), tmp_path)
    assert refusals(output) == REFUSALS.get(page, [])


def refusals(output: str) -> list[str]:
    """Codes of the errors that a server answered, in what a page printed."""
    return re.findall(r'{"error": {"message": .*?"code": "?(\w+)"?}}', output)


def test_an_error_that_a_server_answers_is_seen() -> None:
    error = {"message": 'no "x"', "type": "invalid_request_error", "param": None, "code": "no_x"}
    other = json.dumps({"error": error | {"code": "no_y"}})
    assert refusals(f"{json.dumps({'error': error})}{other}\nmore") == ["no_x", "no_y"]
    assert refusals(json.dumps({"error": error | {"code": None}})) == ["null"]
    assert refusals('{"message": "error", "code": "x"}') == []


@pytest.mark.parametrize("page", pages())
def test_its_commands_and_flags_are_there(page: str) -> None:
    wrong = {
        str(b): found for b in blocks(page) if b.language == "sh" and (found := problems(b.code))
    }
    assert wrong == {}


def test_make_serve_is_what_stands_in_for_it() -> None:
    serve = re.search(
        r"^serve: .*\n\t\.venv/bin/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert serve is not None
    stand_ins = [block.instead for block in blocks("README.md") if "make serve" in block.code]
    assert stand_ins == [f"{serve[1]} &"]


def unknown_variables(text: str) -> set[str]:
    """Variables of ours that a page names and that no setting has."""
    named = set(re.findall(r"\bFATHOM_[A-Z_]*[A-Z]\b", text))
    ours = {variable(name) for name in Settings.model_fields}
    ours |= {f"{VLLM_PREFIX}{name.upper()}" for name in ResolverSettings.model_fields}
    return named - ours - OTHER_VARIABLES


@pytest.mark.parametrize("page", pages())
def test_its_variables_are_settings(page: str) -> None:
    assert unknown_variables((ROOT / page).read_text("utf-8")) == set()


def test_a_variable_that_is_no_setting_is_found() -> None:
    assert unknown_variables("`FATHOM_PORT` FATHOM_PROT=1, and `FATHOM_*`") == {"FATHOM_PROT"}
