"""Samples to numbers: rates, ratios in pairs of the same round, targets. Pure functions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from tests.bench.peers.cases import TARGETS

ENGINE = "fathom"


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt at one peer in one case of one round; `reference_s` are the runs around it."""

    case: str
    peer: str
    round: int
    attempt: int
    duration_s: float
    num_output_tokens: int
    reference_s: tuple[float, float]
    is_discarded: bool
    error: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests over the sample's duration."""
        return self.num_output_tokens / self.duration_s if self.duration_s else 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of `num` values."""

    median: float
    min: float
    max: float
    num: int


@dataclass(frozen=True, slots=True)
class Result:
    """One peer in one case. `ratio` is Fathom's tokens per second over the peer's."""

    case: str
    peer: str
    tokens_per_s: Spread | None
    ratio: Spread | None
    target: float | None

    @property
    def is_met(self) -> bool | None:
        """None where there is no target or no ratio."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio.median >= self.target


def spread(values: Iterable[float]) -> Spread | None:
    """None of nothing."""
    found = list(values)
    return Spread(median(found), min(found), max(found), len(found)) if found else None


def kept(samples: Iterable[Sample], case: str, peer: str) -> dict[int, Sample]:
    """The sample that counts of each round."""
    return {
        sample.round: sample
        for sample in samples
        if (sample.case, sample.peer) == (case, peer)
        and not sample.is_discarded
        and sample.error is None
    }


def result(samples: Iterable[Sample], case: str, peer: str) -> Result:
    """What all rounds say; a round in which either side has no sample has no ratio."""
    samples = list(samples)
    ours, theirs = kept(samples, case, ENGINE), kept(samples, case, peer)
    ratio = None
    if peer != ENGINE:
        ratio = spread(
            ours[number].tokens_per_s / theirs[number].tokens_per_s
            for number in sorted(ours.keys() & theirs.keys())
        )
    rates = spread(sample.tokens_per_s for sample in theirs.values())
    return Result(case, peer, rates, ratio, TARGETS.get((case, peer)))


def results(samples: Iterable[Sample], pairs: Mapping[str, Iterable[str]]) -> list[Result]:
    """For every case of `pairs` its peers, in the order given."""
    samples = list(samples)
    return [result(samples, case, peer) for case, peers in pairs.items() for peer in peers]
