"""A stranger's pattern costs little to compile, or is refused before it is."""

import tracemalloc

import pytest

from boundary.bounded_regex import MAX_REPEATS, compile_bounded

UNROLLED = "((a{99}){99}){99}"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (UNROLLED, "repeat counts"),
        ("a{ 5000 }", "repeat counts"),
        ("(?x)a{ 99 }", "flag x"),
        ("(?i:(?sx:a))", "flag x"),
        ("(a", "no usable pattern"),
        ("a{99999999999999999999}", "repeat counts"),
    ],
)
def test_what_is_refused(pattern: str, why: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=why):
            compile_bounded(pattern)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pattern", ["a{10}b{10}", "(?i)x", "x{2,5}", rf"(\d{{{MAX_REPEATS}}})"])
def test_what_is_taken(pattern: str) -> None:
    assert compile_bounded(pattern).pattern == pattern
