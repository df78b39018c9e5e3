"""Who takes part: a peer that fails is excluded with its reason, in its cases alone, and ended."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from server.bench.load import LoadResult, Timing
from server.bench.mix import Choice
from server.bench.workload import WorkItem
from tests.bench.peers import lineup
from tests.bench.peers.cases import BY_KEY, Case
from tests.bench.peers.equality import Equality
from tests.bench.peers.process import StartFailed
from tests.bench.peers.side import Completions

CASES = [BY_KEY["1-base"], BY_KEY["16-four"]]
RIGHT, WRONG = [1, 2], [1, 3]


class FakeTree:
    def __init__(self, share: float) -> None:
        self.share = share
        self.is_paused = False

    def idle_share(self, seconds: float) -> float:
        return self.share

    def pause(self) -> None:
        self.is_paused = True


class FakeSide:
    def __init__(self, tokens: list[int], share: float, is_pausable: bool) -> None:
        self.tokens = tokens
        self.tree: Any = FakeTree(share)
        self.is_pausable = is_pausable

    def run(self, items: Sequence[WorkItem], num_streams: int) -> tuple[LoadResult, Completions]:
        timings = tuple(Timing(0.0, num_output_tokens=2) for _ in items)
        return LoadResult(1.0, timings), {item.prompt: self.tokens for item in items}


class FakePeer:
    """A server for base cases and one for adapters, as vLLM has them."""

    title = "Fake"
    packages = ()
    notes: Mapping[str, str] = {}

    def __init__(
        self,
        name: str,
        *,
        tokens: list[int] = RIGHT,
        share: float = 0.0,
        is_pausable: bool = True,
        cannot: dict[str, str] | None = None,
        breaks: str | None = None,
    ) -> None:
        self.name = name
        self.cannot = cannot or {}
        self.side = FakeSide(tokens, share, is_pausable)
        self.breaks = breaks
        self.running: list[str] = []
        self.num_prepared = 0
        self.num_started = 0

    def prepare(self, place: Any) -> str:
        self.num_prepared += 1
        if self.breaks == "prepare":
            raise StartFailed("no tcmalloc")
        return "python"

    def variant(self, case: Case) -> str:
        return "adapters" if case.adapters else "base"

    @contextmanager
    def serve(self, variant: str, place: Any) -> Iterator[FakeSide]:
        if self.breaks == variant:
            raise StartFailed("ended with 1: out of memory")
        self.num_started += 1
        self.running.append(variant)
        try:
            yield self.side
        finally:
            self.running.remove(variant)


class FakeReference:
    def items(self, has_adapters: bool) -> list[WorkItem]:
        return [WorkItem((1, 2) if has_adapters else (3, 4), 2, Choice())]

    def compare(self, items: Sequence[WorkItem], completions: Completions) -> Equality:
        wrong = [i for i in items if completions[i.prompt] != RIGHT]
        return Equality(len(items) - len(wrong), 0, len(items), "a0: token 2" if wrong else None)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineup, "versions", lambda python, packages: {})


def line_up(
    stack: ExitStack, *peers: FakePeer, before: lineup.Lineup | None = None
) -> lineup.Lineup:
    """A round's line-up; `before` is what the rounds before it found."""
    place: Any = None
    reference: Any = FakeReference()
    found = before or lineup.Lineup()
    lineup.line_up(found, peers, CASES, place, reference, stack)  # type: ignore[arg-type]
    return found


def test_a_right_peer_takes_part_in_all_its_cases() -> None:
    peer = FakePeer("a")
    with ExitStack() as stack:
        found = line_up(stack, peer)
        assert set(found.runners) == {("1-base", "a"), ("16-four", "a")}
        assert not found.excluded
        assert peer.running == ["base", "adapters"]
    assert peer.running == []


def test_other_tokens_exclude_and_end_a_peer_and_no_other() -> None:
    wrong, right = FakePeer("wrong", tokens=WRONG), FakePeer("right")
    with ExitStack() as stack:
        found = line_up(stack, wrong, right)
        assert {peer for _, peer in found.runners} == {"right"}
        assert found.excluded["1-base", "wrong"] == "excluded: 0 of 1 equal to PEFT's; a0: token 2"
        assert wrong.running == []


def test_a_variant_that_does_not_start_excludes_its_cases_alone() -> None:
    with ExitStack() as stack:
        found = line_up(stack, FakePeer("a", breaks="adapters"))
        assert set(found.runners) == {("1-base", "a")}
        assert found.excluded == {("16-four", "a"): "excluded: ended with 1: out of memory"}


def test_a_peer_that_cannot_be_made_says_why_in_every_case() -> None:
    with ExitStack() as stack:
        found = line_up(stack, FakePeer("a", breaks="prepare"))
        assert not found.runners
        assert set(found.excluded.values()) == {"excluded: cannot be made: no tcmalloc"}


def test_every_round_starts_processes_of_its_own_and_checks_them_all() -> None:
    peer = FakePeer("a")
    with ExitStack() as stack:
        found = line_up(stack, peer)
        first = found.runners["16-four", "a"]
    with ExitStack() as stack:
        line_up(stack, peer, before=found)
        assert peer.num_started == 2 * len({"base", "adapters"})
        assert peer.num_prepared == 1
        assert found.runners["16-four", "a"] is not first
        assert str(found.equality["a adapters"]) == "2 of 2 equal to PEFT's"


def test_who_fails_in_a_later_round_has_no_numbers_and_is_not_started_again() -> None:
    peer, other = FakePeer("a"), FakePeer("b")
    with ExitStack() as stack:
        found = line_up(stack, peer, other)
    peer.side.tokens = WRONG
    with ExitStack() as stack:
        line_up(stack, peer, other, before=found)
        assert {name for _, name in found.runners} == {"b"}
        assert found.excluded["1-base", "a"] == "excluded: 0 of 1 equal to PEFT's; a0: token 2"
    num_prepared, num_started = peer.num_prepared, peer.num_started
    peer.side.tokens = RIGHT
    with ExitStack() as stack:
        line_up(stack, peer, other, before=found)
        assert {name for _, name in found.runners} == {"b"}
        assert (peer.num_prepared, peer.num_started) == (num_prepared, num_started)


def test_what_a_peer_cannot_do_is_not_tried() -> None:
    peer = FakePeer("a", cannot={"16-four": "none"})
    with ExitStack() as stack:
        found = line_up(stack, peer)
        assert found.excluded == {("16-four", "a"): "none"}
        assert peer.running == ["base"]


def test_a_peer_that_can_do_no_case_is_not_even_made() -> None:
    peer = FakePeer("a", cannot={"1-base": "no", "16-four": "none"}, breaks="prepare")
    with ExitStack() as stack:
        found = line_up(stack, peer)
        assert found.excluded == {("1-base", "a"): "no", ("16-four", "a"): "none"}


@pytest.mark.parametrize(
    ("share", "is_pausable", "is_paused"),
    [(0.005, True, False), (0.49, True, True), (0.49, False, False)],
)
def test_only_who_spins_is_paused(share: float, is_pausable: bool, is_paused: bool) -> None:
    peer = FakePeer("a", share=share, is_pausable=is_pausable)
    with ExitStack() as stack:
        found = line_up(stack, peer)
        assert found.runners["1-base", "a"].is_paused is is_paused
        assert peer.side.tree.is_paused is is_paused


def test_in_16_bits_nothing_is_compared() -> None:
    place: Any = None
    reference: Any = FakeReference()
    peers: Any = [FakePeer("a", tokens=WRONG)]
    found = lineup.Lineup()
    with ExitStack() as stack:
        lineup.line_up(found, peers, [BY_KEY["16-bit"]], place, reference, stack)
        assert set(found.runners) == {("16-bit", "a")}
        assert not found.equality
