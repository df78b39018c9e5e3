"""Requests and tokens a minute of each key, in buckets that fill again all the time.

A bucket holds a minute's allowance and gains a sixtieth of it a second. A request is one request,
and reserves its tokens before it is queued: its prompt and as much as it may write. What it did not
use flows back when it ends. A request that states no length reserves `UNSTATED_TOKENS`; what it
writes beyond them is taken as it comes, and may leave the bucket in debt: then the next ones wait.

Own code, because `limits`, the library for this, can neither give back nor go into debt, keeps an
object a token, and reads the wall clock, which may be set back. Limits are this process's own.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from server.access.key import Key
from server.errors import BadRequest, RateLimited

Unit = Literal["requests", "tokens"]

MINUTE_S = 60.0
UNSTATED_TOKENS = 256

Clock = Callable[[], float]
"""Seconds that only grow."""


class Bucket:
    """An allowance a minute. `level` is what may be taken now; below 0 is a debt."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit = limit
        self._clock = clock
        self._level = float(limit)
        self._filled_s = clock()

    @property
    def level(self) -> float:
        """What may be taken now."""
        now_s = self._clock()
        gained = (now_s - self._filled_s) * self.limit / MINUTE_S
        self._level = min(self._level + gained, float(self.limit))
        self._filled_s = now_s
        return self._level

    def wait_s(self, amount: int) -> float:
        """How long until this much may be taken; 0 if it may be now."""
        # A millionth is forgiven: what fills by fractions never is exactly whole.
        return max(0.0, amount - 1e-6 - self.level) * MINUTE_S / self.limit

    def take(self, amount: int) -> None:
        """Take more than there is, if it must be; a negative amount flows back."""
        self._level = min(self.level - amount, float(self.limit))


@dataclass(slots=True)
class Reservation:
    """Tokens of one HTTP request, until it ends."""

    bucket: Bucket | None
    amount: int

    def used(self, num_tokens: int) -> None:
        """So many were used so far; what is more than was reserved is taken now."""
        if self.bucket is not None and num_tokens > self.amount:
            self.bucket.take(num_tokens - self.amount)
            self.amount = num_tokens

    def end(self, num_tokens: int) -> None:
        """So many were used in all; the rest flows back. Idempotent."""
        self.used(num_tokens)
        if self.bucket is not None:
            self.bucket.take(num_tokens - self.amount)
            self.amount = num_tokens


class KeyRates:
    """The buckets of one key; None where it has no limit."""

    def __init__(self, key: Key, clock: Clock) -> None:
        grant = key.grant
        self.of = (grant.requests_per_minute, grant.tokens_per_minute)
        self.requests, self.tokens = (
            None if limit is None else Bucket(limit, clock) for limit in self.of
        )

    def take_request(self) -> None:
        """Count a request. Raises RateLimited."""
        if self.requests is not None:
            _check(self.requests, 1, "requests")
            self.requests.take(1)

    def reserve(self, num_prompt: int, num_answer: int, *, is_stated: bool) -> Reservation:
        """Tokens of a request about to be queued. Raises RateLimited, and BadRequest for too many ever.

        is_stated: whether the client itself asked for `num_answer`.
        """
        bucket = self.tokens
        if bucket is None:
            return Reservation(None, 0)
        if not is_stated:
            room = max(bucket.limit - num_prompt, 0)
            num_answer = min(num_answer, UNSTATED_TOKENS, room)
        amount = num_prompt + num_answer
        if amount > bucket.limit:
            raise BadRequest(
                f"the request may take {amount} tokens ({num_prompt} of the prompt and up to "
                f"{num_answer} of the answer), and this key's limit is {bucket.limit} a minute",
                param="max_tokens",
                code="tokens_over_limit",
            )
        _check(bucket, amount, "tokens")
        bucket.take(amount)
        return Reservation(bucket, amount)


class RateLimits:
    """The buckets of every key that asked something of this process."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._by_key: dict[str, KeyRates] = {}

    def of(self, key: Key) -> KeyRates:
        """A key's buckets; full ones if its limits are new."""
        rates = self._by_key.get(key.id)
        limits = (key.grant.requests_per_minute, key.grant.tokens_per_minute)
        if rates is None or rates.of != limits:
            rates = self._by_key[key.id] = KeyRates(key, self._clock)
        return rates


def _check(bucket: Bucket, amount: int, unit: Unit) -> None:
    wait_s = bucket.wait_s(amount)
    if wait_s > 0:
        left = max(0, math.floor(bucket.level))
        raise RateLimited(
            f"this key's limit of {bucket.limit} {unit} a minute is reached: {left} are left, "
            f"{amount} asked for; try again in {wait_s:.3g} s",
            unit=unit,
            retry_after_s=math.ceil(wait_s),
        )
