"""No adapter starves another: the stated bound, counted in admissions, under the loads that break lines.

Time is steps and tokens are made up. The controls serve the same loads in simpler orders, in which
somebody waits far longer than the bound.
"""

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from server.engine.sequence import Sequence, Status
from server.engine.waiting_line import SlotTurns, WaitingLine, flow, max_admitted_before
from tests.engine.test_scheduler import BASE, Line, adapter

NUM_ADAPTERS = 64
NUM_SLOTS = 8
NUM_SEQS = 20
BOUND = max_admitted_before(NUM_ADAPTERS, NUM_SLOTS, turn_size=NUM_SEQS)
NUM_STEPS = 1600

Arrivals = Callable[[Random, int, WaitingLine], list[tuple[int, int]]]
"""Adapter, by uid, and number of tokens of the requests that come at this step; 0 is the base model."""


class Watched:
    """A line under load, and for each adapter's first in line how many of others' go before it."""

    def __init__(self, *, num_slots: int = NUM_SLOTS, num_blocks: int = 4000) -> None:
        self.line = Line(
            num_blocks=num_blocks, budget=512, max_num_seqs=NUM_SEQS, num_slots=num_slots
        )
        self.num_left: dict[Sequence, int] = {}
        self.num_before: dict[Sequence, int] = {}
        """Of those that wait at the head of their adapter's line."""
        self.worst = 0
        self.who = Counter[int]()

    def arrive(self, uid: int, num_tokens: int, priority: int = 0) -> None:
        name = f"r{self.line.num_arrived}"
        lora = BASE if uid == 0 else adapter(uid)
        self.num_left[self.line.add(name, 4, lora, priority=priority)] = num_tokens

    def step(self) -> None:
        scheduler = self.line.scheduler
        heads: dict[int | None, Sequence] = {}
        for sequence in scheduler.waiting:
            heads.setdefault(flow(sequence), sequence)
        for head in heads.values():
            self.num_before.setdefault(head, 0)
        scheduled = scheduler.schedule()
        for sequence in scheduler.admitted:
            uid = flow(sequence)
            self.worst = max(self.worst, self.num_before.pop(sequence, 0))
            self.who[uid or 0] += 1
            for head in self.num_before:
                self.num_before[head] += uid is not None and uid != flow(head)
        for item in scheduled:
            self.line.scheduler.computed(item.sequence, item.num_tokens)
            item.sequence.token_ids.append(7)
            self.num_left[item.sequence] -= 1
            if self.num_left[item.sequence] <= 0:
                scheduler.finish(item.sequence)
        # Who still waits has seen as many as it has.
        self.worst = max([self.worst, *self.num_before.values()])


def zipf(random: Random, _step: int, waiting: WaitingLine) -> list[tuple[int, int]]:
    """As many as keep a hundred waiting, most of few adapters."""
    weights = [1 / rank for rank in range(1, NUM_ADAPTERS + 1)]
    num_missing = max(0, 100 - len(waiting))
    uids = random.choices(range(1, NUM_ADAPTERS + 1), weights, k=num_missing)
    return [(uid, random.randint(2, 12)) for uid in uids]


def flood(random: Random, step: int, waiting: WaitingLine) -> list[tuple[int, int]]:
    """Eight adapters that always have a long line, and one request for another now and then."""
    uids = [*range(1, NUM_SLOTS + 1)] * 10 if len(waiting) < 100 else []
    uids += [9 + step // 50 % 50] if step % 50 == 0 else []
    return [(uid, random.randint(2, 12)) for uid in uids]


def trickle(_random: Random, step: int, _waiting: WaitingLine) -> list[tuple[int, int]]:
    """Eight adapters of which each has two running at any time; beside them the base model and others."""
    uids = [uid for uid in range(1, NUM_SLOTS + 1) if (step + uid) % 4 == 0]
    uids += [9 + step // 100] if step % 100 == 20 else []
    return [(uid, 8) for uid in uids] + ([(0, 2)] if step % 4 == 0 else [])


LOADS = {"zipf": zipf, "flood": flood, "trickle": trickle}


def serve(arrivals: Arrivals, seed: int) -> Watched:
    random = Random(seed)
    watched = Watched()
    for step in range(NUM_STEPS):
        for uid, num_tokens in arrivals(random, step, watched.line.scheduler.waiting):
            watched.arrive(uid, num_tokens)
        watched.step()
    return watched


@pytest.mark.parametrize("load", LOADS)
def test_nobody_waits_longer_than_the_bound(load: str) -> None:
    watched = serve(LOADS[load], seed=1)
    assert watched.worst <= BOUND == 63 + 20 * 71
    assert sum(watched.who.values()) > 2 * BOUND, "too few to tell"
    if load == "zipf":
        assert set(watched.who) == set(range(1, NUM_ADAPTERS + 1)), "each was served"
    for sequence in list(watched.num_left):
        watched.line.scheduler.finish(sequence)
    watched.line.assert_all_is_back()
    assert watched.line.scheduler._turns._num_running == Counter()
    assert watched.line.scheduler._turns._num_passing == Counter()


def test_whoever_shouts_delays_anothers_first_by_one() -> None:
    """No slots are short: only seats are, and a thousand requests stand before another's one."""
    watched = Watched(num_slots=NUM_ADAPTERS)
    for _ in range(1000):
        watched.arrive(1, num_tokens=20)
    watched.step()
    watched.arrive(2, num_tokens=20)
    for _ in range(30):
        watched.step()
    assert watched.who[2] == 1
    assert watched.worst <= 1


# ---------------------------------------------------------------- controls


def test_control_without_turns_a_trickle_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: who has a slot passes all who wait for one, for as long as it never pauses."""
    monkeypatch.setattr(SlotTurns, "may_enter", lambda *_: True)
    watched = serve(trickle, seed=1)
    assert watched.worst > BOUND
    assert set(watched.who) == set(range(NUM_SLOTS + 1)), "none of the others was ever served"


def test_control_in_order_of_arrival_whoever_shouts_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_arrival(self: WaitingLine) -> list[Sequence]:
        lines = [line for lines in self._classes.values() for line in lines.values()]
        return sorted((sequence for line in lines for sequence in line), key=lambda s: s.order)

    monkeypatch.setattr(WaitingLine, "in_turn", by_arrival)
    watched = Watched(num_slots=NUM_ADAPTERS)
    for _ in range(1000):
        watched.arrive(1, num_tokens=20)
    watched.step()
    watched.arrive(2, num_tokens=20)
    for _ in range(30):
        watched.step()
    assert watched.who[2] == 0


# ---------------------------------------------------------------- the line itself


def test_lines_take_turns_within_a_class_and_classes_do_not() -> None:
    line = Line(max_num_seqs=1)
    for name, uid, priority in [
        ("a1", 1, 0), ("a2", 1, 0), ("a3", 1, 0), ("b1", 2, 0), ("base", 0, 0),
        ("b2", 2, 0), ("idle", 3, 5), ("urgent", 1, -5), ("urgent too", 1, -5),
    ]:  # fmt: skip
        line.add(name, 3, BASE if uid == 0 else adapter(uid), priority=priority)
    expected = ["urgent", "urgent too", "a1", "b1", "base", "a2", "b2", "a3", "idle"]
    assert line.waiting == expected
    assert len(line.scheduler.waiting) == 9
    served = []
    while line.scheduler.has_work:
        ((name, _),) = line.step()
        served.append(name)
        line.finish(name)
    assert served == expected
    line.assert_all_is_back()


def test_a_depth_of_zero_stands_with_the_base_model() -> None:
    line = Line()
    assert flow(line.add("zero", 3, adapter(1, depth=0))) is None
    assert flow(line.add("one", 3, adapter(1, depth=1))) == 1
    assert flow(line.add("two", 3, adapter(1, depth=2))) == 1


def test_nobody_behind_begins_a_turn_while_another_waits_for_a_slot() -> None:
    """Slots are room for bytes too: what is too little for one must not go to one behind it."""
    line = Line(num_slots=1)
    line.add("holds", 3, adapter(1))
    line.step()
    line.slots.too_large = {2}
    line.slots.num_slots = 2
    line.add("large", 3, adapter(2))
    line.add("small", 3, adapter(3))
    assert line.step() == [("holds", 1)]
    assert line.waiting == ["large", "small"]
    line.slots.too_large = set()
    assert line.step() == [("holds", 1), ("large", 3)]
    line.assert_all_is_back()


def test_a_preempted_sequence_goes_before_every_other_adapter() -> None:
    line = Line(num_blocks=6, prefix_caching=False, budget=64)
    line.add("first", 12)
    preempted = line.add("second", 11, adapter(1))
    line.step()
    line.add("third", 3, adapter(2))
    line.add("fourth", 3)
    while preempted.status is Status.RUNNING:
        line.step()
    assert line.waiting == ["second", "third", "fourth"]
