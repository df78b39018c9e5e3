"""Shares of adapters and depths: parsed, refused by name, and dealt out exactly."""

from collections import Counter
from random import Random

import pytest

from server.bench.mix import Choice, deal, mix_of, parse_mix
from server.config import ConfigError

ADAPTERS = ("a0", "a1", "x=y")


def test_a_mix_names_adapters_depths_and_weights() -> None:
    assert parse_mix("base=1, a0@4=1,a1@full=2.5,x=y@0=1e-1", ADAPTERS) == (
        (Choice(), 1.0),
        (Choice("a0", 4), 1.0),
        (Choice("a1"), 2.5),
        (Choice("x=y", 0), 0.1),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "NAME"),
        ("a0", "NAME"),
        ("a0=", "NAME"),
        ("=1", "NAME"),
        ("a0=0", "above 0"),
        ("a0=-1", "above 0"),
        ("a0=nan", "above 0"),
        ("a0=inf", "above 0"),
        ("a0=1,", "NAME"),
        ("a9=1", "there are: a0, a1"),
        ("base@3=1", "no adapter 'base'"),
        ("a0@x=1", "a depth is a number or full"),
        ("a0@-1=1", "a depth is a number or full"),
        ("a0=1,a0@full=2", "twice"),
    ],
)
def test_what_is_no_mix_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="--mix") as refused:
        parse_mix(text, ADAPTERS)
    assert message in str(refused.value)


def test_adapters_at_each_depth_in_equal_shares() -> None:
    assert mix_of(["a0", "a1"], "full, 6,full") == tuple(
        (Choice(name, depth), 1.0) for name in ("a0", "a1") for depth in (None, 6)
    )
    assert mix_of([], "full") == ((Choice(), 1.0),)
    with pytest.raises(ConfigError, match="--depths"):
        mix_of(["a0"], "auto")


def test_shares_are_dealt_exactly_and_by_seed() -> None:
    mix = parse_mix("base=1,a0=1,a1=2", ADAPTERS)
    dealt = deal(mix, 16, Random(1))
    assert Counter(map(str, dealt)) == {"base": 4, "a0@full": 4, "a1@full": 8}
    assert deal(mix, 16, Random(1)) == dealt
    assert deal(mix, 16, Random(2)) != dealt


def test_what_does_not_divide_goes_to_the_largest_remainders() -> None:
    dealt = deal(parse_mix("base=1,a0=1,a1=3", ADAPTERS), 4, Random(0))
    assert Counter(map(str, dealt)) == {"base": 1, "a0@full": 1, "a1@full": 2}
