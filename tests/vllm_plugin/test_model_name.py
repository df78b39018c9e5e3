"""`adapter@12`: which adapter and depth a name means, and which names mean none."""

import pytest

from server.errors import BadRequest
from server.vllm.model_name import Asked, parse

KNOWN = {"a", "b@3", "sql@prod"}


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("a", Asked("a", None)),
        ("a@0", Asked("a", 0)),
        ("a@12", Asked("a", 12)),
        ("a@auto", Asked("a", "auto")),
        ("a@full", Asked("a", "full")),
        ("b@3", Asked("b@3", None)),  # its own name
        ("b@3@2", Asked("b@3", 2)),
        ("sql@prod@auto", Asked("sql@prod", "auto")),
    ],
)
def test_a_name_means_an_adapter_and_a_depth(model: str, asked: Asked) -> None:
    assert parse(model, KNOWN.__contains__) == asked


@pytest.mark.parametrize("depth", ["", "-1", "+1", "1.5", "0x3", "deep", "AUTO", "1" * 10, "²"])
def test_another_depth_of_a_known_adapter_is_refused(depth: str) -> None:
    with pytest.raises(BadRequest, match="must be a number of layers, 'auto' or 'full'"):
        parse(f"a@{depth}", KNOWN.__contains__)


@pytest.mark.parametrize("model", ["", "c", "c@3", "b", "b@2", "@3", "a@3@3", "sql"])
def test_an_unknown_adapter_is_none_whatever_its_depth(model: str) -> None:
    assert parse(model, KNOWN.__contains__) is None


@pytest.mark.parametrize(
    "name", ["../a", "a/../a", "/a", ".a", "..", "a\\b", "a\nb", "a\0", "a" * 257, "a\u202eb"]
)
@pytest.mark.parametrize("suffix", ["", "@2"])
def test_what_is_no_plain_name_is_not_even_looked_for(name: str, suffix: str) -> None:
    looked_for: list[str] = []

    def is_adapter(asked: str) -> bool:
        looked_for.append(asked)
        return True

    assert parse(name + suffix, is_adapter) is None
    assert looked_for == []
