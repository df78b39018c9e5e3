"""Who runs next and with how many tokens. Tokens are made up here; no model runs."""

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from server.config import MAX_BEYOND_SHARE
from server.engine.block_manager import BlockManager, root_key
from server.engine.request import AdapterRef, LoraSelection, Request, SamplingParams
from server.engine.scheduled import Scheduled
from server.engine.scheduler import MAX_RECOMPUTED, Scheduler
from server.engine.sequence import Sequence, SequenceGroup, Status
from server.model.adapters import BASE_SLOT
from server.model.checkpoint import LoraCheckpoint

BLOCK_SIZE = 4
NUM_LAYERS = 4
CHECKPOINT = LoraCheckpoint({}, {}, 1, NUM_LAYERS, "d", 0, None)


class FakeSlots:
    """As many adapters as there are slots, by uid."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.users: dict[int, int] = {}
        self.broken: set[int] = set()
        self.too_large: set[int] = set()

    def acquire(
        self, uid: int, checkpoint: LoraCheckpoint, depth: int, keep_depth: int | None
    ) -> int | None:
        if uid in self.broken:
            raise MemoryError("no memory")
        is_full = uid not in self.users and len(self.users) == self.num_slots
        if is_full or uid in self.too_large:
            return None
        self.users[uid] = self.users.get(uid, 0) + 1
        return uid

    def release(self, uid: int, depth: int) -> None:
        self.users[uid] -= 1
        if self.users[uid] == 0:
            del self.users[uid]


def adapter(uid: int, depth: int = NUM_LAYERS) -> LoraSelection:
    ref = AdapterRef(f"a{uid}", uid, f"digest{uid}", 1, NUM_LAYERS, 0, "path", content=CHECKPOINT)
    return LoraSelection(ref, depth, NUM_LAYERS, "request")


BASE = LoraSelection(None, 0, NUM_LAYERS, "base")


class Line:
    """A scheduler and the requests that went to it, stepped with made-up tokens."""

    def __init__(
        self,
        num_blocks: int = 100,
        budget: int = 16,
        max_num_seqs: int = 8,
        num_slots: int = 8,
        prefix_caching: bool = True,
    ) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, prefix_caching)
        self.slots = FakeSlots(num_slots)
        slots: Any = self.slots
        self.scheduler = Scheduler(self.blocks, slots, max_num_seqs, budget)
        self.sequences: dict[str, Sequence] = {}
        self.num_arrived = 0

    def add(
        self,
        name: str,
        prompt: int | Iterable[int],
        lora: LoraSelection = BASE,
        n: int = 1,
        priority: int = 0,
        **sampling: Any,
    ) -> Sequence:
        """`prompt`: tokens, or how many tokens that nobody else has."""
        if isinstance(prompt, int):
            prompt = range(1000 * self.num_arrived, 1000 * self.num_arrived + prompt)
        params = SamplingParams(max_tokens=100, n=n, **sampling)
        request = Request(name, tuple(prompt), params, lora, priority)
        group = SequenceGroup(request, self.num_arrived)
        self.num_arrived += 1
        unused: Any = None
        for index in range(n):
            key = root_key("r", lora)
            sequence = Sequence(group, index, key, BLOCK_SIZE, unused, unused, None)
            group.sequences.append(sequence)
            self.sequences[name if index == 0 else f"{name}.{index}"] = sequence
        for sequence in group.sequences:
            self.scheduler.add(sequence)
        return group.sequences[0]

    def name_of(self, sequence: Sequence) -> str:
        (name,) = [name for name, other in self.sequences.items() if other is sequence]
        return name

    def schedule(self) -> list[Scheduled]:
        scheduled = self.scheduler.schedule()
        most = self.scheduler.max_num_batched_tokens
        num_tokens = sum(item.num_tokens for item in scheduled)
        assert num_tokens <= most + most // MAX_BEYOND_SHARE
        if num_tokens > most:  # it ends a prompt, and there was room when it was chosen
            assert scheduled[-1].is_last_chunk
            assert num_tokens - scheduled[-1].num_tokens < most
        for item in scheduled:
            assert item.sequence.status is Status.RUNNING
            end = item.sequence.num_computed + item.num_tokens
            assert len(item.sequence.block_table) == self.blocks.num_blocks_for(end)
        tables = [s.block_table for s in self.scheduler.running]
        held = {block for table in tables for block in table}
        assert self.blocks.num_free == self.blocks.num_blocks - len(held)
        return scheduled

    def step(self) -> list[tuple[str, int]]:
        """Schedule, compute, and give each complete sequence a token; who ran, and how much."""
        scheduled = self.schedule()
        for item in scheduled:
            is_last_chunk = item.is_last_chunk
            self.scheduler.computed(item.sequence, item.num_tokens)
            self.scheduler.publish(item.sequence)
            if is_last_chunk:
                item.sequence.token_ids.append(7)
        return [(self.name_of(item.sequence), item.num_tokens) for item in scheduled]

    def finish(self, name: str) -> None:
        self.scheduler.finish(self.sequences[name])

    @property
    def waiting(self) -> list[str]:
        return [self.name_of(sequence) for sequence in self.scheduler.waiting]

    def assert_all_is_back(self) -> None:
        for sequence in self.sequences.values():
            self.scheduler.finish(sequence)
        assert not self.scheduler.has_work
        assert self.blocks.num_free == self.blocks.num_blocks
        assert self.slots.users == {}


# ---------------------------------------------------------------- a step


def test_decoding_rows_come_first_and_prompts_take_what_is_left() -> None:
    line = Line(budget=16)
    line.add("long", 40)
    assert line.step() == [("long", 16)]
    line.add("short", 3)
    assert line.step() == [("long", 16)]  # it came first, and takes the whole budget
    assert line.step() == [("long", 8), ("short", 3)]
    line.add("late", 20)
    assert line.step() == [("long", 1), ("short", 1), ("late", 14)]
    assert line.step() == [("long", 1), ("short", 1), ("late", 6)]
    assert line.step() == [("long", 1), ("short", 1), ("late", 1)]
    line.assert_all_is_back()


def test_a_step_is_a_little_longer_where_that_ends_a_prompt() -> None:
    line = Line(budget=16)
    line.add("first", 3)
    line.step()
    for name in ("second", "third", "late"):
        line.add(name, 8)
    # 17 tokens: the third would else leave one for a step of its own.
    assert line.step() == [("first", 1), ("second", 8), ("third", 8)]
    line.add("last", 30)
    assert line.step() == [("first", 1), ("second", 1), ("third", 1), ("late", 8), ("last", 5)]
    assert line.step() == [("first", 1), ("second", 1), ("third", 1), ("late", 1), ("last", 12)]
    assert line.step()[-1] == ("last", 13)


def test_a_sequence_that_decodes_goes_before_an_earlier_prompt() -> None:
    line = Line(budget=16)
    line.add("first", 2)
    line.step()
    line.add("prompt", 40, priority=-1)
    assert line.step() == [("first", 1), ("prompt", 15)]
    assert line.step() == [("first", 1), ("prompt", 15)]


def test_the_last_of_a_prompt_is_one_token_but_no_decoding() -> None:
    line = Line(budget=MAX_BEYOND_SHARE - 1)  # too few for a step to be longer
    sequence = line.add("x", MAX_BEYOND_SHARE)
    line.step()
    assert sequence.num_to_compute == 1
    assert not sequence.is_decoding
    line.step()
    assert sequence.is_decoding


def test_no_more_sequences_than_allowed_run_at_once() -> None:
    line = Line(max_num_seqs=2)
    for name in "xyz":
        line.add(name, 3)
    assert line.step() == [("x", 3), ("y", 3)]
    line.finish("x")
    assert line.step() == [("y", 1), ("z", 3)]


def test_the_line_is_by_priority_then_arrival() -> None:
    line = Line(max_num_seqs=1)
    line.add("first", 3)
    line.add("second", 3)
    line.add("urgent", 3, priority=-1)
    line.add("idle", 3, priority=1)
    served = []
    while line.scheduler.has_work:
        ((name, _),) = line.step()
        served.append(name)
        line.finish(name)
    assert served == ["urgent", "first", "second", "idle"]


# ---------------------------------------------------------------- too few blocks


def test_the_last_in_order_gives_way() -> None:
    line = Line(num_blocks=6, prefix_caching=False)
    line.add("last", 4, priority=1)
    line.add("first", 4)
    line.add("second", 4)
    assert {name for name, _ in line.step()} == {"first", "second", "last"}
    line.step()  # each takes its second block: all six are held
    for _ in range(3):
        assert len(line.step()) == 3
    line.step()
    assert line.waiting == ["last"]
    assert line.scheduler.num_preemptions == 1
    last = line.sequences["last"]
    assert (last.num_computed, last.block_table, last.status) == (0, [], Status.WAITING)
    assert last.num_output_tokens == 5  # its tokens stay
    line.finish("first")
    assert line.step() == [("second", 1)]  # three blocks would do, but not for long
    line.finish("second")
    assert ("last", 9) in line.step()
    line.assert_all_is_back()


def test_a_sequence_that_is_itself_the_last_gives_way() -> None:
    line = Line(num_blocks=4, prefix_caching=False)
    line.add("first", 4)
    line.add("second", 5)
    line.step()
    line.step()
    for _ in range(2):
        assert len(line.step()) == 2
    # The second needs a third block, and all four are held by both.
    assert line.step() == [("first", 1)]
    assert line.waiting == ["second"]


def test_nobody_is_admitted_in_the_step_of_a_preemption() -> None:
    """The blocks that were given back are for those who run; what is left shows in the next."""
    line = Line(num_blocks=5, prefix_caching=False, budget=64)
    line.add("first", 8)
    line.add("second", 8)
    line.step()
    line.add("urgent", 5, priority=-1)
    line.add("tiny", 1)
    assert line.step() == [("first", 1)]
    assert line.waiting == ["urgent", "second", "tiny"]
    assert line.step() == [("first", 1), ("urgent", 5)]
    assert line.waiting == ["second", "tiny"]  # nor does the tiny one overtake
    line.assert_all_is_back()


def test_no_one_overtakes_a_sequence_that_waits_for_blocks() -> None:
    line = Line(num_blocks=6, budget=64)
    line.add("runs", 15)
    line.step()
    line.add("big", 12)
    line.add("small", 1)
    for _ in range(3):
        assert line.step() == [("runs", 1)]
    assert line.waiting == ["big", "small"]
    line.finish("runs")
    assert line.step() == [("big", 12), ("small", 1)]


def test_shared_blocks_that_nobody_holds_count_as_taken() -> None:
    """A cached block is free until it is shared: then it is one fewer for the rest."""
    line = Line(num_blocks=4, budget=64)
    line.add("warm", range(8))
    line.step()
    line.finish("warm")
    line.add("other", 7)
    line.step()
    assert line.blocks.num_free == 2
    # Its first two blocks are the only free ones, and it needs a third.
    line.add("same", range(12))
    assert line.step() == [("other", 1)]
    assert line.waiting == ["same"]
    line.finish("other")
    assert line.step() == [("same", 4)]
    line.assert_all_is_back()


# ---------------------------------------------------------------- what preemption costs


def test_a_decoding_row_takes_no_block_of_a_prompt_that_has_begun() -> None:
    """Else the prompt finds out at its end, when all of it is lost."""
    line = Line(num_blocks=12, budget=5, prefix_caching=False)
    line.add("decodes", 4)
    line.step()
    prompt = line.add("prompt", 40)
    assert line.step() == [("decodes", 1), ("prompt", 4)]  # its second block, and ten are claimed
    for _ in range(3):
        assert line.step() == [("decodes", 1), ("prompt", 4)]
    assert line.blocks.num_free > 0
    assert line.step() == [("decodes", 1)]  # no free block is left that nobody claims
    assert (line.waiting, prompt.num_lost_tokens) == (["prompt"], 16)
    line.assert_all_is_back()


def is_preempted_by_who_comes_first(line: Line) -> bool:
    """`late` was preempted once and runs again; is it preempted once more for an urgent request?"""
    line.add("urgent", 28, priority=-1)
    late = line.add("late", 8)
    line.step()
    while "late" not in line.waiting:
        line.step()
    length = len(late.token_ids)
    line.finish("urgent")
    line.step()
    line.add("more urgent", 20, priority=-2)
    while len(late.token_ids) < 2 * length and "late" not in line.waiting:
        line.step()
    return "late" in line.waiting


def test_who_was_preempted_is_not_again_before_it_is_twice_as_long() -> None:
    line = Line(num_blocks=12, budget=64, prefix_caching=False)
    assert not is_preempted_by_who_comes_first(line)
    assert line.waiting == ["more urgent"]  # which gave way itself
    line.assert_all_is_back()


def test_without_protection_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_is_protected", lambda *_: False)
    assert is_preempted_by_who_comes_first(Line(num_blocks=12, budget=64, prefix_caching=False))


def test_tokens_are_counted_that_are_computed_again() -> None:
    line = Line(num_blocks=4, prefix_caching=False)
    line.add("first", 8)
    line.add("second", 7)
    line.step()
    line.step()  # the first takes its third block, and the second gives its two back
    assert line.waiting == ["second"]
    assert line.scheduler.num_recomputed_tokens == 0
    line.finish("first")
    line.step()
    assert line.scheduler.num_recomputed_tokens == 7
    line.assert_all_is_back()


def worst_recomputed(seed: int) -> float:
    """Tokens computed again over tokens of use, of the sequence with the most.

    Urgent requests keep coming beside prompts that fill much of the cache.
    """
    random = Random(seed)
    line = Line(num_blocks=random.randint(10, 16), budget=16, prefix_caching=False)
    computed: dict[str, int] = {}
    for number in range(400):
        if number < 300 and random.random() < 0.3:
            line.add(f"{number}", random.randint(1, 8), priority=-1)
        if number < 300 and random.random() < 0.05:
            line.add(f"{number} long", random.randint(16, 32))
        for name, num_tokens in line.step():
            computed[name] = computed.get(name, 0) + num_tokens
            if line.sequences[name].num_output_tokens >= 8:
                line.finish(name)
    shares = {
        name: num_tokens / (len(line.sequences[name].token_ids) - 1) - 1
        for name, num_tokens in computed.items()
    }
    finished = [name for name in computed if line.sequences[name].status is Status.FINISHED]
    assert len(finished) > 20
    line.assert_all_is_back()
    return max(shares[name] for name in finished)


@pytest.mark.parametrize("seed", range(8))
def test_no_sequence_computes_again_more_than_the_bound(seed: int) -> None:
    assert worst_recomputed(seed) < MAX_RECOMPUTED


def test_the_bound_is_not_kept_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_is_protected", lambda *_: False)
    assert max(map(worst_recomputed, range(8))) > MAX_RECOMPUTED


# ---------------------------------------------------------------- the prefix cache


def test_a_known_prefix_is_not_computed_again() -> None:
    line = Line()
    line.add("warm", range(10))
    line.step()
    line.add("same", range(10))
    assert line.step() == [("warm", 1), ("same", 2)]
    warm, same = line.sequences["warm"], line.sequences["same"]
    assert same.block_table[:2] == warm.block_table[:2]
    assert same.block_table[2] != warm.block_table[2]
    assert same.group.num_cached_tokens == 8
    line.assert_all_is_back()


def test_of_a_prompt_that_is_known_whole_the_last_token_is_computed() -> None:
    line = Line()
    line.add("warm", range(8))
    line.step()
    line.add("same", range(8))
    assert line.step() == [("warm", 1), ("same", 4)]


@pytest.mark.parametrize(
    ("other", "num_tokens"), [(adapter(1), 10), (adapter(1, 2), 10), (adapter(1, 0), 2)]
)
def test_another_adapter_or_depth_is_another_prefix(other: LoraSelection, num_tokens: int) -> None:
    line = Line()
    line.add("warm", range(10))
    line.step()
    line.add("other", range(10), other)
    assert line.step() == [("warm", 1), ("other", num_tokens)]


def test_who_scores_the_prompt_computes_all_of_it() -> None:
    line = Line()
    line.add("warm", range(10))
    line.step()
    line.add("scored", range(10), prompt_logprobs=1)
    assert line.step() == [("warm", 1), ("scored", 10)]
    assert line.sequences["scored"].group.num_cached_tokens == 0


def test_generated_blocks_are_shared_too() -> None:
    line = Line(max_num_seqs=1)
    first = line.add("first", range(6))
    for _ in range(4):
        line.step()
    line.finish("first")
    line.add("again", first.token_ids)  # 6 of the prompt and 4 that were generated
    assert line.step() == [("again", 2)]


def test_siblings_wait_for_the_first_and_take_its_prompt() -> None:
    line = Line(budget=16)
    line.add("x", 20, n=3)
    line.add("y", 2)
    assert line.step() == [("x", 16)]
    assert line.waiting == ["x.1", "x.2", "y"]
    assert line.step() == [("x", 4), ("y", 2)]  # others may overtake those that wait by choice
    assert line.step() == [("x", 1), ("y", 1), ("x.1", 4), ("x.2", 4)]
    line.assert_all_is_back()


def test_siblings_do_not_wait_for_one_that_has_ended() -> None:
    line = Line(budget=16)
    line.add("x", 20, n=2)
    line.step()
    line.finish("x")
    assert line.step() == [("x.1", 4)]


def test_without_a_cache_siblings_have_nothing_to_wait_for() -> None:
    line = Line(budget=64, prefix_caching=False)
    line.add("x", 20, n=2)
    assert line.step() == [("x", 20), ("x.1", 20)]


# ---------------------------------------------------------------- adapter slots


def test_who_waits_for_a_slot_is_passed_by_those_who_need_none() -> None:
    line = Line(num_slots=1)
    line.add("one", 3, adapter(1))
    line.add("two", 3, adapter(2))
    line.add("one_too", 3, adapter(1))
    line.add("base", 3)
    line.add("two_at_zero", 3, adapter(2, depth=0))
    assert line.step() == [("one", 3), ("base", 3), ("one_too", 3), ("two_at_zero", 3)]
    assert line.waiting == ["two"]
    line.finish("one")
    assert ("two", 3) not in line.step()
    line.finish("one_too")
    assert ("two", 3) in line.step()
    assert line.sequences["two"].slot == 2
    assert line.sequences["base"].slot == line.sequences["two_at_zero"].slot == BASE_SLOT
    line.assert_all_is_back()


def test_a_preempted_sequence_gives_its_slot_back() -> None:
    line = Line(num_blocks=4, num_slots=1, prefix_caching=False)
    line.add("first", 8)
    line.add("second", 7, adapter(1))
    line.step()
    assert line.slots.users == {1: 1}
    line.step()
    assert line.waiting == ["second"]
    assert line.slots.users == {}
    assert line.sequences["second"].slot == BASE_SLOT


def test_an_adapter_that_finds_no_room_is_reported_and_holds_up_nobody() -> None:
    line = Line()
    line.slots.broken.add(1)
    bad = line.add("bad", 3, adapter(1))
    line.add("good", 3)
    assert line.step() == [("good", 3)]
    ((failed, error),) = line.scheduler.failed
    assert failed is bad
    assert isinstance(error, MemoryError)
    line.finish("bad")
    line.step()
    assert line.scheduler.failed == []
    line.assert_all_is_back()


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("num_steps", range(4))
def test_finishing_is_idempotent_wherever_the_sequence_is(num_steps: int) -> None:
    line = Line(budget=16, max_num_seqs=1)
    line.add("x", 20, adapter(1))
    line.add("waits", 3, adapter(1))
    for _ in range(num_steps):
        line.step()
    for name in ("x", "waits"):
        for _ in range(2):
            line.finish(name)
            assert line.sequences[name].status is Status.FINISHED
    line.assert_all_is_back()


def test_everything_ends_however_short_of_blocks() -> None:
    """Nobody starves: with room for one sequence at a time, all get their tokens in order."""
    line = Line(num_blocks=5, budget=16)
    names = [line.name_of(line.add(str(index), 6 + index)) for index in range(4)]
    ended = []
    for _ in range(400):
        for name, _ in line.step():
            if line.sequences[name].num_output_tokens >= 8:
                line.finish(name)
                ended.append(name)
        if not line.scheduler.has_work:
            break
    assert sorted(ended) == names
    assert ended[0] == "0"
    assert line.scheduler.num_preemptions > 0
    line.assert_all_is_back()


def test_a_selection_is_not_changed_by_serving_it() -> None:
    line = Line()
    lora = adapter(1, depth=2)
    line.add("x", 3, lora)
    line.step()
    assert line.sequences["x"].request.lora == replace(lora)
