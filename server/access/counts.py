"""What was used: requests and tokens, and what of them belongs to requests that ended early."""

from dataclasses import astuple, dataclass
from datetime import datetime

HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums over HTTP requests.

    Tokens are those that came out of the engine, prompts counted with their first output. `aborted_`
    is the part of requests that did not finish: the client left, time was over, the server failed.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    aborted_requests: int = 0
    aborted_prompt_tokens: int = 0
    aborted_completion_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Account:
    """What is counted apart: one key, model and effective depth, in one hour.

    hour: since 1970, in UTC.
    base: the base model's name.
    adapter: None for the base model itself.
    """

    hour: int
    key: str
    base: str
    adapter: str | None
    depth: int


def hour_of(time: datetime) -> int:
    """The hour of an aware time."""
    return int(time.timestamp()) // HOUR_S
