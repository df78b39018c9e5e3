"""The page's files: they find each other, need nobody else, run under a strict policy, and are small."""

import gzip
import hashlib
from pathlib import Path

import pytest

from server.console.assets import FOLDER, PAGE, load_assets
from tests.console.referenced import forbidden, missing, read_page, unused

MAX_COMPRESSED_BYTES = 100_000
LIBRARIES = ("htm", "preact")


def files() -> dict[str, str]:
    return {
        path.relative_to(FOLDER).as_posix(): path.read_text(encoding="utf-8")
        for path in FOLDER.rglob("*")
        if path.is_file()
    }


def served() -> dict[str, str]:
    """Without licences and sums, which no browser asks for."""
    return {name: text for name, text in files().items() if not name.endswith(".txt")}


def broken_sums(folder: Path) -> set[str]:
    """Vendored files that are not what `SHA256SUMS.txt` says, or that it does not know."""
    lines = (folder / "SHA256SUMS.txt").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    here = {path.name: path for path in folder.iterdir() if path.name != "SHA256SUMS.txt"}
    return {
        name
        for name in sums.keys() | here.keys()
        if name not in here
        or name not in sums
        or hashlib.sha256(here[name].read_bytes()).hexdigest() != sums[name]
    }


def test_everything_that_is_referred_to_is_there_and_used() -> None:
    assert missing(files()) == set()
    assert unused(files(), "main.js") == set()
    assets = load_assets()
    page = read_page(assets.page.content.decode())
    prefix = f"console/{assets.digest}/"
    assert all(address.startswith(prefix) for address in page.addresses)
    assert {address.removeprefix(prefix) for address in page.addresses} <= assets.files.keys()
    modules = {name for name in assets.files if name.endswith((".js", ".mjs"))}
    assert {f"{prefix}{name}" for name in modules} <= set(page.addresses), "each is preloaded"


def test_a_reference_to_nothing_and_a_file_for_nothing_are_found() -> None:
    planted = {
        "main.js": 'import { a } from "./a.js";\nimport b from "preact";\nimport("./gone.js");',
        "a.js": 'export { c } from "./vendor/c.mjs";',
        "vendor/c.mjs": 'import{d}from"./d.mjs"',
        "alone.js": "",
    }
    assert missing(planted) == {
        ("main.js", "preact"),
        ("main.js", "./gone.js"),
        ("vendor/c.mjs", "./d.mjs"),
    }
    assert unused(planted, "main.js") == {"alone.js"}


def test_nothing_names_another_host_or_makes_code_of_text() -> None:
    assert set(forbidden(served())) == set()
    assert read_page(files()[PAGE]).inline == []


@pytest.mark.parametrize(
    "text",
    [
        'fetch("https://cdn.example/x.js")',
        'import("//cdn.example/x.js")',
        "eval('1')",
        "new Function('return 1')",
        'setTimeout("run()", 1)',
        "element.innerHTML = text",
        "body { background: url(https://fonts.example/a.woff2) }",
        "@import 'x.css';",
    ],
)
def test_another_host_and_code_of_text_are_found(text: str) -> None:
    assert list(forbidden({"planted.js": text})) != []


@pytest.mark.parametrize(
    "text",
    [
        "<script>run()</script>",
        '<p onclick="run()">',
        '<p style="color: red">',
        "<style>p {}</style>",
    ],
)
def test_what_the_policy_forbids_inline_is_found(text: str) -> None:
    assert read_page(text).inline != []


def test_all_of_it_is_small() -> None:
    sizes = [len(gzip.compress(text.encode())) for text in served().values()]
    assert sum(sizes) < MAX_COMPRESSED_BYTES, sum(sizes)


def test_libraries_are_as_they_came_with_their_licences() -> None:
    folder = FOLDER / "vendor"
    assert broken_sums(folder) == set()
    for name in LIBRARIES:
        assert (folder / f"{name}.LICENSE.txt").stat().st_size > 500


def test_a_library_that_was_touched_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.mjs").write_text("a")
    (tmp_path / "b.mjs").write_text("b")
    (tmp_path / "new.mjs").write_text("c")
    written = {"a.mjs": "a", "b.mjs": "another", "gone.mjs": "d"}
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in written.items()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (tmp_path / "SHA256SUMS.txt").write_text(lines)
    assert broken_sums(tmp_path) == {"b.mjs", "gone.mjs", "new.mjs"}
