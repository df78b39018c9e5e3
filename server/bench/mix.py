"""Which adapter and depth each request asks for.

`base=1,a0@4=1,a1@full=2`: shares, which are dealt out exactly and then shuffled, not drawn: with 16
requests and four equal shares every run has four of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from server.config import ConfigError


@dataclass(frozen=True, slots=True)
class Choice:
    """One model a request can ask for. No adapter is the base model; no depth is the whole adapter."""

    adapter: str | None = None
    depth: int | None = None

    def __str__(self) -> str:
        if self.adapter is None:
            return "base"
        return f"{self.adapter}@{'full' if self.depth is None else self.depth}"


Mix = tuple[tuple[Choice, float], ...]
"""Choices with their weights, each at least once and every weight above 0."""


def parse_mix(text: str, adapters: Sequence[str]) -> Mix:
    """Raises ConfigError for what is no mix, and for adapters that there are none of."""
    mix: dict[Choice, float] = {}
    for item in text.split(","):
        name, separator, weight_text = item.strip().rpartition("=")
        try:
            weight = float(weight_text)
        except ValueError:
            weight = math.nan
        if not separator or not name or not (0 < weight < math.inf):
            raise ConfigError(
                f"--mix: should be NAME[@DEPTH]=WEIGHT, weight above 0 (given {item!r})"
            )
        choice = _parse_choice(name, adapters)
        if choice in mix:
            raise ConfigError(f"--mix: names {choice} twice")
        mix[choice] = weight
    return tuple(mix.items())


def mix_of(adapters: Sequence[str], depths: str) -> Mix:
    """Every adapter at each of `depths`, in equal shares; the base model where there is no adapter."""
    if not adapters:
        return ((Choice(), 1.0),)
    wanted = dict.fromkeys(_parse_depth("--depths", text) for text in depths.split(","))
    return tuple((Choice(name, depth), 1.0) for name in adapters for depth in wanted)


def deal(mix: Mix, num_requests: int, random: Random) -> list[Choice]:
    """`num_requests` choices in proportion, largest remainders first, in random order."""
    total = sum(weight for _, weight in mix)
    exact = [weight / total * num_requests for _, weight in mix]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(mix)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: num_requests - sum(counts)]:
        counts[index] += 1
    dealt = [choice for (choice, _), n in zip(mix, counts, strict=True) for _ in range(n)]
    random.shuffle(dealt)
    return dealt


def _parse_choice(name: str, adapters: Sequence[str]) -> Choice:
    if name == "base":
        return Choice()
    adapter, separator, depth = name.rpartition("@")
    choice = Choice(adapter, _parse_depth("--mix", depth)) if separator else Choice(name)
    if choice.adapter not in adapters:
        known = ", ".join(adapters) or "none"
        raise ConfigError(f"--mix: no adapter {choice.adapter!r}; there are: {known}")
    return choice


def _parse_depth(flag: str, text: str) -> int | None:
    text = text.strip()
    if text == "full":
        return None
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{flag}: a depth is a number or full (given {text!r})")
    return int(text)
