"""Which sequences run in the next step, and with how many tokens.

Decoding sequences first, one token each; then prefill chunks of running ones; then admission, in the
order of `waiting_line`. When blocks run out, the last in order of priority and arrival of those not yet
in the step gives its blocks back and waits to be computed anew: its tokens and generator stay, so
nobody can tell from its output. Knows blocks and slots, not tensors.

What preemption may cost is bounded. A sequence is admitted with a claim on the blocks of its whole
prompt, which nobody else is given meanwhile: no long prompt is begun that cannot be finished beside
those that are. One that was preempted claims twice the tokens that it has to compute again (or all that
it may ever have, if that is less) and is not preempted within its claim, so it is at least twice as long
each time it is. What a sequence computes again is then less than n + n/2 + n/4 + ..., with n its length
the last time: less than `MAX_RECOMPUTED` times the tokens it ends with.
"""

from collections.abc import Callable

from server.config import MAX_BEYOND_SHARE
from server.engine.block_manager import BlockManager
from server.engine.request import AdapterRef
from server.engine.scheduled import Scheduled
from server.engine.sequence import Sequence, Status
from server.engine.waiting_line import SlotTurns, WaitingLine, flow
from server.model.adapters import BASE_SLOT, AdapterSlots
from server.model.checkpoint import LoraCheckpoint

MAX_RECOMPUTED = 2
"""Tokens computed again over tokens of use, prompt and completion, of any finished sequence: less."""


class Scheduler:
    """Owns the waiting line and the running set."""

    def __init__(
        self,
        blocks: BlockManager,
        slots: AdapterSlots,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        keep_depth: Callable[[AdapterRef], int] | None = None,
    ) -> None:
        """keep_depth: how deep an adapter is worth keeping in a slot; without it, whole."""
        self.blocks = blocks
        self._keep_depth = keep_depth
        self.slots = slots
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._max_beyond = max_num_batched_tokens // MAX_BEYOND_SHARE
        self.waiting = WaitingLine()
        self._turns = SlotTurns(max_num_seqs)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.num_cached_tokens = 0
        self.num_looked_up_tokens = 0
        self.failed: list[tuple[Sequence, Exception]] = []
        """Sequences whose adapter the last `schedule` could not put on the device, and why."""
        self.admitted: list[Sequence] = []
        """Sequences that the last `schedule` let run for the first time."""
        self._has_preempted = False

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line."""
        sequence.status = Status.WAITING
        self.waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back its blocks and slot. Idempotent."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def schedule(self) -> list[Scheduled]:
        """Choose the next step. Every scheduled sequence holds the blocks it needs for it."""
        self.failed.clear()
        self.admitted.clear()
        scheduled: dict[Sequence, int] = {}
        budget = self.max_num_batched_tokens
        decoding_first = sorted(self.running, key=lambda s: (not s.is_decoding, s.order))
        for sequence in decoding_first:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it
            num_tokens = self._share(sequence, budget)
            if num_tokens and self._make_room(sequence, num_tokens, scheduled):
                scheduled[sequence] = num_tokens
                budget -= num_tokens
        if not self._has_preempted:  # else the blocks of the one that left would go to another
            self._admit(scheduled, budget)
        self._has_preempted = False
        return [Scheduled.of(sequence, num_tokens) for sequence, num_tokens in scheduled.items()]

    @property
    def has_room(self) -> bool:
        """True while a waiting sequence might be admitted, if blocks and slots allow."""
        return bool(self.waiting) and len(self.running) < self.max_num_seqs

    def reserve(self, sequence: Sequence) -> bool:
        """Give a running sequence the block of the token after those it has, if one is free."""
        return self._grow(sequence, 1)

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Record that a step computed a sequence's next tokens."""
        sequence.num_computed += num_tokens

    def publish(self, sequence: Sequence) -> None:
        """Share a sequence's full blocks: what it computed is known to be finite."""
        num_full = sequence.num_computed // self.blocks.block_size
        if num_full > sequence.num_published:
            keys = sequence.block_keys(num_full)
            for index in range(sequence.num_published, num_full):
                self.blocks.publish(sequence.block_table[index], keys[index])
            sequence.num_published = num_full

    def distrust(self, sequence: Sequence) -> None:
        """Share what a sequence holds with nobody who comes: what it read or wrote may be why it failed."""
        self.blocks.forget(sequence.block_table)

    def _share(self, sequence: Sequence, budget: int) -> int:
        """Tokens of it for a step that has so many left; a few more where they end a prompt.

        Else they would take a step of their own, which reads all weights for them.
        """
        num_tokens = sequence.num_to_compute
        if budget <= 0:
            return 0
        return num_tokens if num_tokens <= budget + self._max_beyond else budget

    def _make_room(
        self, sequence: Sequence, num_tokens: int, scheduled: dict[Sequence, int]
    ) -> bool:
        """Give the sequence blocks for its next tokens, at the cost of those after it in line."""
        while not self._grow(sequence, num_tokens):
            victims = [
                other
                for other in self.running
                if other is sequence or (other not in scheduled and not self._is_protected(other))
            ]
            victim = max(victims, key=_order)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        num_held = len(sequence.block_table)
        num_needed = self.blocks.num_blocks_for(sequence.num_computed + num_tokens)
        num_beyond = num_needed - max(num_held, self._num_claimed(sequence))
        if num_beyond > 0 and num_beyond > self._num_unclaimed():
            return False
        fresh = self.blocks.allocate(max(0, num_needed - num_held))
        assert fresh is not None  # what is claimed is free
        sequence.block_table.extend(fresh)
        return True

    def _num_claimed(self, sequence: Sequence) -> int:
        """Blocks of its claim, held or not."""
        num_blocks = self.blocks.num_blocks_for(sequence.num_claimed_tokens)
        return min(num_blocks, self.blocks.num_blocks)

    def _num_unclaimed(self) -> int:
        """Free blocks that no running sequence still has to get."""
        num_owed = sum(max(0, self._num_claimed(s) - len(s.block_table)) for s in self.running)
        return self.blocks.num_free - num_owed

    def _claim(self, sequence: Sequence) -> int:
        """Tokens for which a sequence gets blocks set aside as it is admitted."""
        num_tokens = len(sequence.token_ids)
        if sequence.num_lost_tokens:
            longest = sequence.num_prompt_tokens + sequence.request.sampling.max_tokens
            return min(2 * num_tokens, longest)
        return num_tokens

    def _is_protected(self, sequence: Sequence) -> bool:
        """Whether it was preempted before and has not outgrown its claim since."""
        is_within = len(sequence.token_ids) <= sequence.num_claimed_tokens
        return sequence.num_lost_tokens > 0 and is_within

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.num_lost_tokens = sequence.num_computed
        self._release(sequence)
        self.add(sequence)
        self.num_preemptions += 1
        self._has_preempted = True

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        sequence.num_published = 0
        sequence.num_claimed_tokens = 0
        adapter = sequence.request.lora.adapter
        if sequence.slot != BASE_SLOT and adapter is not None:
            self.slots.release(adapter.uid, sequence.request.lora.effective_depth)
            self._turns.left(adapter.uid)
            sequence.slot = BASE_SLOT

    def _admit(self, scheduled: dict[Sequence, int], budget: int) -> None:
        self._turns.look_from_the_front()
        for sequence in self.waiting.in_turn():
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                return
            adapter = flow(sequence)
            if adapter is not None and not self._turns.may_enter(adapter):
                continue
            if not self._leader_is_ready(sequence):
                continue
            cached = self._cached_blocks(sequence)
            claim = self._claim(sequence)
            num_needed = min(self.blocks.num_blocks_for(claim), self.blocks.num_blocks)
            num_taken = num_needed - len(cached) + self.blocks.num_free_among(cached)
            if num_taken > self._num_unclaimed():
                return  # no one overtakes a sequence that waits for blocks, or it might starve
            try:
                if not self._take_slot(sequence):
                    self._turns.waits()
                    continue  # its adapter waits for a slot; others need not
            except Exception as error:  # noqa: BLE001 -- it ends this request, not the loop
                self.failed.append((sequence, error))
                continue
            self.blocks.share(cached)
            sequence.block_table = list(cached)
            sequence.num_published = len(cached)
            sequence.num_computed = len(cached) * self.blocks.block_size
            sequence.num_claimed_tokens = claim
            self._count_cached(sequence)
            num_tokens = self._share(sequence, budget)
            self.waiting.admit(sequence)
            self.running.append(sequence)
            self._grow(sequence, num_tokens)
            sequence.status = Status.RUNNING
            if adapter is not None:
                self._turns.entered(adapter)
            scheduled[sequence] = num_tokens
            budget -= num_tokens

    def _leader_is_ready(self, sequence: Sequence) -> bool:
        # The siblings of an n > 1 request wait until the first has computed the prompt, and then find it
        # in the prefix cache instead of each computing it.
        if sequence.index == 0 or not self.blocks.prefix_caching:
            return True
        leader = sequence.group.sequences[0]
        return leader.status is Status.FINISHED or leader.num_computed >= leader.num_prompt_tokens

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        if sequence.wants_prompt_logprobs:
            return []  # every prompt position must pass through lm_head
        # At least one token is computed, because its logits are what the step is for.
        num_full = (len(sequence.token_ids) - 1) // self.blocks.block_size
        return self.blocks.match(sequence.block_keys(num_full))

    def _count_cached(self, sequence: Sequence) -> None:
        if sequence.was_admitted:
            # What a preempted sequence finds is its own; what it does not find it computes again.
            self.num_recomputed_tokens += max(0, sequence.num_lost_tokens - sequence.num_computed)
            return
        sequence.was_admitted = True
        self.admitted.append(sequence)
        if self.blocks.prefix_caching and not sequence.wants_prompt_logprobs:
            self.num_looked_up_tokens += sequence.num_prompt_tokens
        self.num_cached_tokens += sequence.num_computed
        if sequence.index == 0:
            sequence.group.num_cached_tokens = sequence.num_computed

    def _take_slot(self, sequence: Sequence) -> bool:
        lora = sequence.request.lora
        if lora.adapter is None or lora.effective_depth == 0:
            return True
        content = lora.adapter.content
        if not isinstance(content, LoraCheckpoint):
            raise TypeError(f"adapter {lora.adapter.name!r} carries no weights")
        keep_depth = None if self._keep_depth is None else self._keep_depth(lora.adapter)
        slot = self.slots.acquire(lora.adapter.uid, content, lora.effective_depth, keep_depth)
        if slot is None:
            return False
        sequence.slot = slot
        return True


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
