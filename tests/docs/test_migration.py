"""The page of migration names our flags, routes and fields as they are."""

import re

import pytest

from server.api.lora import LoadRequest, UnloadRequest
from server.config import Settings, flag
from tests.docs.page import ROOT

PAGE = ROOT / "server" / "docs" / "migration.md"


def known() -> set[str]:
    flags = {flag(name) for name in Settings.model_fields}
    off = {
        flag(f"no_{name}")
        for name, field in Settings.model_fields.items()
        if field.annotation is bool
    }
    return flags | off


def rows(text: str) -> list[tuple[str, str, str]]:
    """Theirs, ours and the remark of every row."""
    cells = (
        re.split(r"(?<!\\) *\| *", line.strip("| "))
        for line in text.splitlines()
        if line[:1] == "|"
    )
    return [
        (a, b, c) for a, b, *rest in cells for c in [rest[0] if rest else ""] if set(a) != {"-"}
    ]


def strange(text: str) -> set[str]:
    """Flags said to be ours that are none."""
    ours = " ".join(f"{row[1]} {row[2]}" for row in rows(text))
    return set(re.findall(r"--[a-z][\w-]*", ours)) - known()


def test_every_flag_of_ours_is_a_setting() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert strange(text) == set()
    assert len(set(re.findall(r"--[a-z][\w-]*", " ".join(row[1] for row in rows(text))))) > 15


@pytest.mark.parametrize("row", ["| `--x` | `--max-lora` | |", "| `--x` | | see `--adapters` |"])
def test_a_flag_that_is_none_is_found(row: str) -> None:
    assert len(strange(row)) == 1


@pytest.mark.parametrize(("route", "body"), [("load", LoadRequest), ("unload", UnloadRequest)])
def test_the_routes_of_vllm_have_the_fields_that_are_named(
    route: str, body: type[LoadRequest] | type[UnloadRequest]
) -> None:
    (fields,) = re.findall(rf"`POST /v1/{route}_lora_adapter {{(.*?)}}`", PAGE.read_text("utf-8"))
    assert set(fields.split(", ")) == set(body.model_fields)


def test_defaults_are_those_of_the_settings() -> None:
    named = {
        name: default
        for _, ours, _ in rows(PAGE.read_text("utf-8"))
        for name, default in re.findall(r"`(--[\w-]+)` \((\w+)\)", ours)
    }
    real = {flag(name): str(field.default) for name, field in Settings.model_fields.items()}
    assert named == {"--max-loras": "8", "--max-lora-rank": "256"}
    assert named == {name: real[name] for name in named}
