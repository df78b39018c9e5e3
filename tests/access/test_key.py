"""What a key may be used for: models by pattern, depths up to a limit, and limits that can be meant."""

from typing import Any

import pytest
from pydantic import ValidationError

from server.access.key import Grant, NewKey
from server.engine.request import AdapterRef, DepthSource, LoraSelection
from server.errors import Forbidden


def selection(depth: int, source: DepthSource = "request", reach: int = 12) -> LoraSelection:
    adapter = AdapterRef("sql", 1, "sha256:sql", 8, reach, 1, "/sql")
    return LoraSelection(adapter, depth, 12, source)


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (None, ["base", "sql", "anything at all"], []),
        (["sql"], ["sql"], ["base", "sql2", "SQL", "s", "nosql"]),
        (["sql*", "base"], ["base", "sql", "sql-2"], ["nosql", "support"]),
        (["team-[ab]/*"], ["team-a/x", "team-b/y/z"], ["team-c/x", "team-a"]),
        (["*"], ["base", "sql"], []),
    ],
)
def test_models_are_allowed_by_name_and_pattern(
    patterns: list[str] | None, allowed: list[str], refused: list[str]
) -> None:
    grant = Grant.model_validate({"adapters": patterns})
    for name in allowed:
        assert grant.allows(name)
        grant.check_model(name)
    for name in refused:
        assert not grant.allows(name)
        with pytest.raises(Forbidden, match="may not use the model"):
            grant.check_model(name)


@pytest.mark.parametrize(
    ("depth", "source", "word"),
    [(7, "request", "got 7)"), (12, "full", "whole adapter"), (8, "calibrated", "calibrated to")],
)
def test_a_depth_above_the_limit_is_refused_with_the_range(
    depth: int, source: DepthSource, word: str
) -> None:
    grant = Grant(max_depth=6)
    with pytest.raises(Forbidden, match="from 0 to 6") as caught:
        grant.check_depth(selection(depth, source))
    assert word in caught.value.message
    assert caught.value.param == "lora_depth"
    Grant(max_depth=depth).check_depth(selection(depth, source))
    Grant().check_depth(selection(depth, source))


def test_a_depth_is_never_taken_for_a_lower_one_that_would_do_the_same() -> None:
    """`full` of an adapter that reaches to 6 is the model of depth 6, and is asked for as 12."""
    with pytest.raises(Forbidden):
        Grant(max_depth=6).check_depth(selection(12, "full", reach=6))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"adapters": []}, "adapters"),
        ({"adapters": [""]}, "adapters"),
        ({"adapters": ["a\nb"]}, "adapters"),
        ({"adapters": "sql"}, "adapters"),
        ({"max_depth": -1}, "max_depth"),
        ({"max_depth": True}, "max_depth"),
        ({"max_depth": "6"}, "max_depth"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"tokens_per_minute": 10**13}, "tokens_per_minute"),
        ({"tokens_per_hour": 1}, "tokens_per_hour"),
    ],
)
def test_a_limit_that_means_nothing_is_refused_by_its_name(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        Grant.model_validate(fields)
    assert caught.value.errors()[0]["loc"][0] == param


@pytest.mark.parametrize("name", ["", " ada", "ada\n", "a" * 101, "a\x00"])
def test_a_name_is_one_line(name: str) -> None:
    with pytest.raises(ValidationError):
        NewKey(name=name)


def test_an_admin_key_takes_no_limits() -> None:
    NewKey(name="ada", scope="admin")
    with pytest.raises(ValidationError, match="no limits"):
        NewKey(name="ada", scope="admin", grant=Grant(max_depth=3))
