"""Before timing: do a peer's greedy tokens equal PEFT's?

PEFT runs in this process, in float32. Where a completion parts from PEFT's, the first token that
differs is judged alone (what follows it answers another text): PEFT's log-probabilities of both
tokens within `TIE` are a tie of float noise, counted by itself and printed; anything else is a
failure, and the peer is excluded. In 16 bits right engines part after some tokens, so nothing is
compared there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.bench.baseline import StaticModel, load_baselines
from server.bench.workload import WorkItem
from server.config import Settings
from tests.bench.peers.cases import BY_KEY, Case
from tests.bench.peers.models import Models

NUM_CHECKED = 20
"""Of the base model, and again of the four adapters: five each."""
TIE = 1e-4
"""Nats."""
_CHECK_RUN = 0
_BATCH_SIZE = 10


@dataclass(frozen=True, slots=True)
class Equality:
    """How many completions equal PEFT's, and how many part at a tie."""

    num_equal: int
    num_ties: int
    num_checked: int
    first_difference: str | None = None

    @property
    def is_passed(self) -> bool:
        """True where every completion is equal or parts at a tie."""
        return self.first_difference is None

    def plus(self, other: "Equality") -> "Equality":
        """What two checks say together."""
        return Equality(
            self.num_equal + other.num_equal,
            self.num_ties + other.num_ties,
            self.num_checked + other.num_checked,
            self.first_difference or other.first_difference,
        )

    def __str__(self) -> str:
        ties = f", {self.num_ties} part at a tie" if self.num_ties else ""
        failure = "" if self.is_passed else f"; {self.first_difference}"
        return f"{self.num_equal} of {self.num_checked} equal to PEFT's{ties}{failure}"


class PeftReference:
    """PEFT's mixed batch over the float32 model, with its answers kept."""

    def __init__(self, models: Models) -> None:
        settings = Settings(
            model=str(models.base("float32")),
            adapter=models.adapters,
            dtype="float32",
            device="cpu",
        )
        choices = BY_KEY["16-four"].choices
        (self._model,) = load_baselines(["peft"], settings, choices, "dynamic")
        self._models = models
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def items(self, has_adapters: bool) -> list[WorkItem]:
        """What is asked of every peer: 20 of the base model, or 5 of each adapter."""
        case = BY_KEY["16-four" if has_adapters else "16-base"]
        return check_items(case, self._models)

    def answers(self, items: Sequence[WorkItem]) -> Mapping[tuple[int, ...], list[int]]:
        """PEFT's tokens, by prompt."""
        missing = [item for item in items if item.prompt not in self._answers]
        for first in range(0, len(missing), _BATCH_SIZE):
            batch = missing[first : first + _BATCH_SIZE]
            for item, tokens in zip(batch, self._model.complete(batch), strict=True):
                self._answers[item.prompt] = tokens
        return self._answers

    def compare(
        self, items: Sequence[WorkItem], completions: Mapping[tuple[int, ...], Sequence[int]]
    ) -> Equality:
        """A peer's completions of `items` beside PEFT's."""
        return compare(self._model, items, self.answers(items), completions)


def check_items(case: Case, models: Models) -> list[WorkItem]:
    """The requests of the check; of one seed they are the same for every peer."""
    offset = 1 if case.adapters else 0
    workload = case.workload(NUM_CHECKED, models.shape.vocab_size, models.seed)
    return workload.run(_CHECK_RUN + offset)


def compare(
    model: StaticModel,
    items: Sequence[WorkItem],
    expected: Mapping[tuple[int, ...], Sequence[int]],
    completions: Mapping[tuple[int, ...], Sequence[int]],
) -> Equality:
    """Judge each completion by its first token that differs."""
    num_equal, num_ties, failure = 0, 0, None
    for item in items:
        wanted, got = list(expected[item.prompt]), list(completions[item.prompt])
        place = first_difference(wanted, got)
        if place is None:
            num_equal += 1
            continue
        gap = _gap(model, item, wanted, got, place)
        if gap is not None and gap <= TIE:
            num_ties += 1
        elif failure is None:
            margin = "no token" if gap is None else f"{gap:.2g} nats less likely"
            failure = f"{item.choice}: token {place + 1} of {len(wanted)} is {margin}"
    return Equality(num_equal, num_ties, len(items), failure)


def first_difference(wanted: Sequence[int], got: Sequence[int]) -> int | None:
    """The first place at which two completions differ; a missing token differs."""
    for place, token in enumerate(wanted):
        if place >= len(got) or got[place] != token:
            return place
    return len(wanted) if len(got) > len(wanted) else None


def _gap(
    model: StaticModel, item: WorkItem, wanted: Sequence[int], got: Sequence[int], place: int
) -> float | None:
    """By how many nats PEFT prefers its own token; None where the peer has none, or no such token."""
    if place >= len(got) or place >= len(wanted):
        return None
    scores = model.log_probabilities(item, wanted[: place + 1])[-1]
    if not 0 <= got[place] < len(scores):
        return None
    return float(scores[wanted[place]] - scores[got[place]])
