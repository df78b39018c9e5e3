"""Who is admitted next: classes by priority, and within a class every adapter in its turn.

A lower priority number goes first, always. Within a class each adapter, and the base model, has a line
of its own in order of arrival, and the lines are served round robin, one sequence each: whoever has a
thousand requests waiting delays another adapter's first by one of them.

A sequence whose adapter finds no slot on the device is passed by others, or steps would be half empty.
How often is bounded by `SlotTurns`, whose turns are as large as a step: with turns of an eighth, a Zipf mix
of 64 adapters on 8 slots was served at half the rate. With A adapters in use, S slots and turns of T, a
request at the head of its adapter's line sees at most `A - 1 + T * (S + A - 1)` sequences of other adapters
admitted before it: one of each line before its own, and T in each turn that is on when it comes or
begins before its own. Each turn ends, because who has used it up is admitted no more and what runs
ends. Sequences that were preempted go first and may begin a turn more each; requests of a higher class
are not counted.
"""

from bisect import insort
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator

from server.engine.sequence import Sequence, Status


def flow(sequence: Sequence) -> int | None:
    """The adapter that a sequence runs with, by uid; None for the base model and depth 0."""
    lora = sequence.request.lora
    return None if lora.adapter is None or lora.effective_depth == 0 else lora.adapter.uid


def max_admitted_before(num_adapters: int, num_slots: int, turn_size: int) -> int:
    """Sequences of other adapters that are admitted while the first of an adapter's line waits."""
    return num_adapters - 1 + turn_size * (num_slots + num_adapters - 1)


class WaitingLine:
    """Sequences that wait, one line an adapter in each class."""

    def __init__(self) -> None:
        self._classes: dict[int, OrderedDict[int | None, list[Sequence]]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they would be admitted if nothing were in their way."""
        for _, lines in sorted(self._classes.items()):
            left = deque(iter(line) for line in lines.values())
            while left:
                line = left.popleft()
                for sequence in line:
                    yield sequence
                    left.append(line)
                    break

    def add(self, sequence: Sequence) -> None:
        """Stand in line. One that ran before, and was preempted, goes before every other adapter's."""
        lines = self._classes.setdefault(sequence.request.priority, OrderedDict())
        insort(lines.setdefault(flow(sequence), []), sequence, key=_order)
        if sequence.was_admitted:
            lines.move_to_end(flow(sequence), last=False)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Leave the line."""
        priority = sequence.request.priority
        lines = self._classes[priority]
        line = lines[flow(sequence)]
        line.remove(sequence)
        if not line:
            del lines[flow(sequence)]
        if not lines:
            del self._classes[priority]
        self._num_waiting -= 1

    def admit(self, sequence: Sequence) -> None:
        """Leave the line because one's turn has come; the adapter's next waits for everyone else's."""
        self.remove(sequence)
        lines = self._classes.get(sequence.request.priority, OrderedDict())
        if flow(sequence) in lines:
            lines.move_to_end(flow(sequence))

    def in_turn(self) -> Iterator[Sequence]:
        """Each that waits, once. An adapter whose sequence was admitted meanwhile goes to the end.

        One that was not stays where it is and is passed by the next of its line.
        """
        for priority in sorted(self._classes):
            lines = self._classes[priority]
            turns = deque(lines)
            num_passed: Counter[int | None] = Counter()
            while turns:
                key = turns.popleft()
                for sequence in lines.get(key, [])[num_passed[key] :]:
                    yield sequence
                    if sequence.status is not Status.WAITING:
                        turns.append(key)
                        break
                    num_passed[key] += 1


class SlotTurns:
    """How often an adapter that has a slot may pass those who wait for one.

    A turn begins with an adapter's first running sequence and ends with its last. While somebody before
    it in line waits for a slot, at most `turn_size` of its sequences are admitted in a turn; then what runs
    ends, and the slot is free. Meanwhile nobody else behind who waits begins a turn.
    """

    def __init__(self, turn_size: int) -> None:
        self.turn_size = turn_size
        self._num_running: Counter[int] = Counter()
        self._num_passing: Counter[int] = Counter()
        self._does_someone_wait = False

    def look_from_the_front(self) -> None:
        """A walk down the line begins."""
        self._does_someone_wait = False

    def may_enter(self, uid: int) -> bool:
        """Whether a sequence of this adapter may ask for its slot, at this place in line."""
        if not self._does_someone_wait:
            return True
        return uid in self._num_running and self._num_passing[uid] < self.turn_size

    def waits(self) -> None:
        """The sequence at this place found no slot."""
        self._does_someone_wait = True

    def entered(self, uid: int) -> None:
        """The sequence at this place has its slot and runs."""
        self._num_running[uid] += 1
        self._num_passing[uid] += self._does_someone_wait

    def left(self, uid: int) -> None:
        """A sequence of this adapter runs no more."""
        self._num_running[uid] -= 1
        if not self._num_running[uid]:
            del self._num_running[uid]
            del self._num_passing[uid]


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
