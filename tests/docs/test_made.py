"""What is made from the code is what lies in the repository, and the picture can be read."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from server.docs.api_reference import api_reference
from server.docs.depth_picture import DARK, LANES, LIGHT, NUM_LAYERS, depth_picture
from tests.docs.page import ROOT

FOLDER = ROOT / "server" / "docs"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.docs", *arguments], capture_output=True, text=True
    )


def test_the_pages_that_are_made_are_those_that_lie_here(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert made == {name: (FOLDER / name).read_text("utf-8") for name in made}
    assert made.keys() == {"api.md", "settings.md", "depth.svg"}


@pytest.mark.slow
def test_a_page_that_differs_is_named(tmp_path: Path) -> None:
    assert run("--out", str(tmp_path)).returncode == 0
    assert run("--out", str(tmp_path), "--check").returncode == 0
    with (tmp_path / "settings.md").open("a") as page:
        page.write("more\n")
    (tmp_path / "depth.svg").unlink()
    done = run("--out", str(tmp_path), "--check")
    assert done.returncode == 1
    assert set(re.findall(r"(\S+): differs", done.stderr)) == {
        str(tmp_path / "settings.md"),
        str(tmp_path / "depth.svg"),
    }


def test_types_are_said_in_words() -> None:
    fields = {
        "depth": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
        "kinds": {"type": "array", "items": {"enum": ["a", "b"]}, "description": "One|two\nlines"},
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 0.5},
        "inner": {"$ref": "#/components/schemas/Inner"},
    }
    body = {
        "title": "Body",
        "properties": fields,
        "required": ["inner"],
        "additionalProperties": False,
    }
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Body"}}}
    operation = {
        "description": "Does it.",
        "security": [{"admin_key": []}],
        "requestBody": {"content": content},
        "responses": {"201": {"content": {"text/plain": {}}}},
    }
    names = ("ErrorResponse", "LoraReport", "Inner", "Unreached")
    schemas = {name: {"type": "object"} for name in names} | {"Body": body}
    text = api_reference(
        {"paths": {"/admin/x": {"post": operation}}, "components": {"schemas": schemas}}
    )
    for line in (
        "| `POST /admin/x` | admin | [Body](#body) | 201 text | Does it. |",
        "| `depth` | integer from 0 |  |  |",
        '| `kinds` | list of `"a"`, `"b"` |  | One\\|two lines |',
        "| `share` | number above 0 to 1 | `0.5` |  |",
        "| `inner` | [Inner](#inner) | required |  |",
        "### Inner",
    ):
        assert line in text.splitlines()
    assert "Unreached" not in text


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_its_words_stand_out_from_the_paper(palette: dict[str, str]) -> None:
    for name in ("text", "quiet"):
        light, dark = sorted(map(luminance, (palette[name], palette["paper"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_picture_shows_the_depths_that_it_names() -> None:
    picture = ElementTree.fromstring(depth_picture())
    bars = [e.get("class") for e in picture.iter("{http://www.w3.org/2000/svg}rect")]
    shown = bars[1 : 1 + NUM_LAYERS * len(LANES)]
    for index, lane in enumerate(LANES):
        lowest_first = shown[index * NUM_LAYERS : (index + 1) * NUM_LAYERS]
        reached = [lane.adapter] * lane.depth
        assert lowest_first == reached + ["base"] * (NUM_LAYERS - lane.depth)
