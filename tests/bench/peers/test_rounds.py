"""One sample: what surrounds it, and what becomes of a side that fails."""

from collections.abc import Sequence
from typing import Any

import pytest

from server.bench.load import LoadResult, Timing
from server.bench.workload import WorkItem
from tests.bench.peers.cases import BY_KEY, OUTPUT_LEN
from tests.bench.peers.rounds import Method, Runner, take_round
from tests.bench.peers.side import Completions

CASE = BY_KEY["16-four"]
METHOD = Method(rounds=1, waves=1, tries=3, seed=0, vocab_size=8000)


class Script:
    """A side, its tree and the reference, which note in one list what is done to them."""

    is_pausable = True

    def __init__(self, speeds_s: Sequence[float], fails: bool = False) -> None:
        self.tree: Any = self
        self.did: list[str] = []
        self.prompts: list[tuple[int, ...]] = []
        self.history = [1.0] * 9
        self.speeds_s = list(speeds_s)
        self.fails = fails

    def pause(self) -> None:
        self.did.append("pause")

    def resume(self) -> None:
        self.did.append("resume")

    def run(self, *load: Any) -> Any:
        if not load:
            self.did.append("reference")
            self.history.append(self.speeds_s.pop(0))
            return self.history[-1]
        return self.complete(*load)

    def complete(
        self, items: Sequence[WorkItem], num_streams: int
    ) -> tuple[LoadResult, Completions]:
        self.did.append(f"{len(items)} by {num_streams}")
        self.prompts += [item.prompt for item in items]
        if self.fails and len(items) > 1:
            raise RuntimeError("the child ended")
        timings = tuple(Timing(0.0, num_output_tokens=item.output_len) for item in items)
        return LoadResult(2.0, timings), {}


def samples(script: Script, *, is_paused: bool = True) -> list[Any]:
    side: Any = script
    reference: Any = script
    sides = {(CASE.key, "peer"): Runner(side, is_paused)}
    return take_round([CASE], sides, METHOD, reference, 0)


def test_a_sample_stands_between_two_reference_runs_of_a_resumed_peer() -> None:
    script = Script([1.0, 1.0])
    (found,) = samples(script)
    assert script.did == ["resume", "1 by 1", "reference", "16 by 16", "reference", "pause"]
    assert found.tokens_per_s == 16 * OUTPUT_LEN / 2.0
    assert not found.is_discarded


def test_who_does_not_spin_is_neither_paused_nor_resumed() -> None:
    script = Script([1.0, 1.0])
    samples(script, is_paused=False)
    assert script.did == ["1 by 1", "reference", "16 by 16", "reference"]


def test_a_discarded_sample_is_taken_again_with_other_prompts() -> None:
    script = Script([1.0, 2.0, 1.0, 1.0])
    found = samples(script)
    assert [sample.is_discarded for sample in found] == [True, False]
    assert len(set(script.prompts)) == len(script.prompts) == 2 * 17


def test_the_tries_are_bounded() -> None:
    found = samples(Script([1.0, 2.0] * 3))
    assert [sample.is_discarded for sample in found] == [True] * 3


def test_a_side_that_fails_is_an_error_and_not_tried_again() -> None:
    script = Script([1.0, 1.0, 1.0], fails=True)
    (found,) = samples(script)
    assert found.error == "RuntimeError: the child ended"
    assert found.tokens_per_s == pytest.approx(0.0)
    assert script.did[-1] == "pause"
