"""Counts by range."""

import math

from server.engine.distribution import Distribution


def test_a_bound_belongs_to_the_range_below_it() -> None:
    distribution = Distribution((1, 2.5, 10))
    for value in (0, 1, 1.001, 2.5, 10, 11, math.inf):
        distribution.observe(value)
    assert distribution.counts() == (2, 2, 1, 2)


def test_the_total_is_the_sum() -> None:
    distribution = Distribution((1,))
    for value in (0.25, 0.5, 4):
        distribution.observe(value)
    assert distribution.total == 4.75
    assert sum(distribution.counts()) == 3
