"""Buckets: what is let through over time, what is reserved and comes back, and debts."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.access.key import Grant, Key
from server.access.rate_limits import UNSTATED_TOKENS, Bucket, KeyRates, RateLimits
from server.errors import BadRequest, RateLimited


class Hand:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Hand:
    return Hand()


def rates_of(clock: Hand, requests: int | None = None, tokens: int | None = None) -> KeyRates:
    grant = Grant(requests_per_minute=requests, tokens_per_minute=tokens)
    return KeyRates(Key("id", "ada", "api", grant, "file"), clock)


def test_a_minute_s_requests_pass_and_the_next_waits_as_long_as_it_is_told(clock: Hand) -> None:
    rates = rates_of(clock, requests=30)
    for _ in range(30):
        rates.take_request()
    with pytest.raises(RateLimited) as caught:
        rates.take_request()
    error = caught.value
    assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
    assert "limit of 30 requests a minute" in error.message
    assert error.retry_after_s == 2
    clock.now_s += 1.9
    with pytest.raises(RateLimited):
        rates.take_request()
    clock.now_s += 0.1
    rates.take_request()
    with pytest.raises(RateLimited):
        rates.take_request()


def test_what_was_refused_costs_nothing(clock: Hand) -> None:
    rates = rates_of(clock, requests=1)
    rates.take_request()
    for _ in range(100):
        with pytest.raises(RateLimited):
            rates.take_request()
    clock.now_s += 60
    rates.take_request()


def test_a_key_without_limits_is_never_stopped(clock: Hand) -> None:
    rates = rates_of(clock)
    for _ in range(1000):
        rates.take_request()
        rates.reserve(10**9, 10**9, is_stated=True).end(10**9)
    assert (rates.requests, rates.tokens) == (None, None)


def test_tokens_are_reserved_and_what_was_not_used_comes_back(clock: Hand) -> None:
    rates = rates_of(clock, tokens=100)
    assert rates.tokens is not None
    first = rates.reserve(10, 50, is_stated=True)
    assert rates.tokens.level == 40
    with pytest.raises(RateLimited) as caught:
        rates.reserve(10, 50, is_stated=True)
    assert caught.value.type == "tokens"
    assert caught.value.retry_after_s == 12  # 20 are missing, 100 come in 60 s
    first.used(12)
    assert rates.tokens.level == 40
    first.end(12)
    first.end(12)
    assert rates.tokens.level == 88
    rates.reserve(10, 50, is_stated=True)


def test_a_request_that_could_never_pass_is_told_so(clock: Hand) -> None:
    rates = rates_of(clock, tokens=100)
    for stated in (True, False):
        with pytest.raises(BadRequest, match="limit is 100 a minute") as caught:
            rates.reserve(101, 1, is_stated=stated)
        assert caught.value.code == "tokens_over_limit"
    with pytest.raises(BadRequest):
        rates.reserve(50, 51, is_stated=True)
    assert rates.tokens is not None
    assert rates.tokens.level == 100
    rates.reserve(50, 50, is_stated=True)


def test_a_request_that_states_no_length_may_leave_a_debt(clock: Hand) -> None:
    rates = rates_of(clock, tokens=600)
    assert rates.tokens is not None
    reservation = rates.reserve(10, 32_000, is_stated=False)
    assert rates.tokens.level == 600 - 10 - UNSTATED_TOKENS
    reservation.used(900)
    assert rates.tokens.level == -300
    with pytest.raises(RateLimited) as caught:
        rates.reserve(1, 1, is_stated=True)
    assert "0 are left" in caught.value.message
    assert caught.value.retry_after_s == 31
    reservation.end(900)
    assert rates.tokens.level == -300
    clock.now_s += 31
    rates.reserve(1, 1, is_stated=True)


def test_a_short_minute_lets_an_unstated_length_through(clock: Hand) -> None:
    rates_of(clock, tokens=100).reserve(10, 32_000, is_stated=False)


def test_a_bucket_never_holds_more_than_a_minute(clock: Hand) -> None:
    bucket = Bucket(10, clock)
    clock.now_s += 10**6
    assert bucket.level == 10
    bucket.take(-5)
    assert bucket.level == 10


def test_limits_that_change_begin_anew_and_others_stay(clock: Hand) -> None:
    limits = RateLimits(clock)
    ada = Key("a", "ada", "api", Grant(requests_per_minute=1), "file")
    bob = Key("b", "bob", "api", Grant(requests_per_minute=1), "file")
    limits.of(ada).take_request()
    limits.of(bob).take_request()  # each has its own
    with pytest.raises(RateLimited):
        limits.of(Key("a", "ada renamed", "api", ada.grant, "file")).take_request()
    limits.of(Key("a", "ada", "api", Grant(requests_per_minute=2), "file")).take_request()


@settings(max_examples=200, deadline=None)
@given(
    limit=st.integers(1, 1000),
    waits=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=60),
)
def test_over_any_time_no_more_passes_than_a_minute_and_what_came_since(
    limit: int, waits: list[float]
) -> None:
    clock = Hand()
    rates = rates_of(clock, requests=limit)
    passed: list[float] = []
    for wait_s in waits:
        clock.now_s += wait_s
        for _ in range(20):
            try:
                rates.take_request()
            except RateLimited:
                break
            passed.append(clock.now_s)
    assert all(a <= b for a, b in pairwise(passed))
    for start in range(0, len(passed), 7):
        span_s = passed[-1] - passed[start]
        assert len(passed) - start <= limit + span_s * limit / 60 + 1e-3
