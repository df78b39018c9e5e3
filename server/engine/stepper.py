"""The step: schedule, run, sample, and give each sequence what it gained.

A sequence at fault is ended and the others go on (`isolation`); where the next step needs nothing that the
host would read first, the device has it before this one's tokens are read (`lookahead`).
"""

import time
from collections.abc import Iterator

import structlog

from server.engine import isolation
from server.engine.lookahead import Ahead, rows_that_go_on
from server.engine.request import SequenceDelta
from server.engine.sampler import Launched, Sampled, Sampler
from server.engine.scheduled import Scheduled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, Status
from server.engine.tally import Tally
from server.model.batch import BatchedSequence
from server.model.runner import Logits, ModelRunner

log = structlog.get_logger(__name__)

Gain = tuple[SequenceDelta, Sequence]
"""What a sequence gained in a step."""


class Stepper:
    """Steps of one engine, one after the other."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        eos_token_ids: frozenset[int],
        tally: Tally,
    ) -> None:
        self.sampler = sampler
        self._runner = runner
        self._scheduler = scheduler
        self._eos_token_ids = eos_token_ids
        self._tally = tally
        self._ahead: Ahead | None = None
        """The next step, where the device was given it before this one's tokens were read."""

    def step(self, fail: isolation.Fail) -> Iterator[Gain]:
        """Run one step over every sequence that has room in it, while what it gave is taken."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            self._runner.slots.drop_unwanted()
        if ahead is not None and ahead.is_wanted:
            yield from self._catch_up(ahead, fail)
        else:
            yield from self._run(fail)

    def forget(self) -> None:
        """Drop the step that was launched ahead."""
        self._ahead = None

    def _run(self, fail: isolation.Fail) -> Iterator[Gain]:
        """Schedule a step, run it, and give each sequence what it gained."""
        scheduled = self._scheduler.schedule()
        self._note_scheduled(scheduled)
        for sequence, error in self._scheduler.failed:
            fail(sequence, isolation.understood(self._runner, error))
        for logits, items in isolation.forward(self._runner, scheduled, fail):
            yield from self._postprocess(logits, items, fail)

    def _catch_up(self, ahead: Ahead, fail: isolation.Fail) -> Iterator[Gain]:
        """The same for a step that runs already. Rows whose sequences have ended meanwhile are dropped."""
        going_on = [each for each in ahead.sequences if each.status is Status.RUNNING]
        for sequence in going_on:
            self._scheduler.computed(sequence, 1)
        self._look_ahead(ahead.sequences, ahead.launched)
        try:
            samples = self.sampler.read(ahead.launched)
        except Exception as error:  # noqa: BLE001 -- as in isolation.forward
            self._ahead = None
            isolation.understood(self._runner, error)
            # As if it had not run: the step that runs now finds who is at fault.
            for sequence in going_on:
                sequence.num_computed -= 1
                sequence.row.rewind()
            yield from self._run(fail)
        else:
            self._tally.count_step(len(ahead.sequences), len(ahead.sequences))
            for sequence in going_on:
                self._tally.count_layers(sequence.request.lora, 1)
            yield from self._take(ahead.sequences, samples, fail)

    def _look_ahead(self, sequences: list[Sequence], launched: Launched) -> None:
        """Launch the step after the one just launched, if it needs nothing that the host would read."""
        rows = rows_that_go_on(self._scheduler, sequences) if self._runner.runs_ahead else []
        if not rows:
            return
        going_on = [sequences[row] for row in rows]
        batch = [
            BatchedSequence(
                [0], len(each.token_ids), each.block_table, each.slot,
                each.request.lora.effective_depth, 1,
            )
            for each in going_on
        ]  # fmt: skip
        try:
            ran = self._runner.run_ahead(batch, launched.token_ids, rows)
            if ran is not None:
                logits, order = ran
                ordered = [going_on[index] for index in order]
                states = [sequence.row for sequence in ordered]
                drawn = self.sampler.launch(logits, states, [None] * len(states))
                self._ahead = Ahead(ordered, drawn)
        except Exception as error:  # noqa: BLE001 -- the step is run again, which finds whose fault it is
            for sequence in going_on:
                sequence.row.rewind(1)
            log.warning("a step could not be run ahead", error=error)

    def _postprocess(
        self, logits: Logits, items: list[Scheduled], fail: isolation.Fail
    ) -> Iterator[Gain]:
        """Record what was computed, then give each sequence whose last token was its next one."""
        sampled_rows: list[int] = []
        sampled: list[Sequence] = []
        row = 0
        for item in items:
            sequence, num_logits = item.sequence, item.num_logits
            is_last_chunk = item.is_last_chunk
            try:
                if sequence.wants_prompt_logprobs:
                    sequence.score_prompt(logits[row : row + num_logits])
            except Exception as error:  # noqa: BLE001 -- as in isolation.forward
                fail(sequence, error)
            row += num_logits
            if sequence.status is not Status.RUNNING:
                continue
            self._scheduler.computed(sequence, item.num_tokens)
            self._tally.count_layers(sequence.request.lora, item.num_tokens)
            if is_last_chunk and sequence.request.sampling.max_tokens == 0:
                self._share_chunk(sequence)
                self._scheduler.finish(sequence)
                yield SequenceDelta(sequence.index, finish_reason="length"), sequence
            elif not is_last_chunk:
                self._share_chunk(sequence)
            else:
                sampled_rows.append(row - 1)
                sampled.append(sequence)
        if sampled_rows != list(range(logits.shape[0])):
            logits = logits[sampled_rows]
        yield from self._sample(logits, sampled, fail)

    def _share_chunk(self, sequence: Sequence) -> None:
        """Logits will tell of the whole prompt that it is finite, but others need not wait for them."""
        blocks = self._scheduler.blocks
        num_full = sequence.num_computed // blocks.block_size
        fresh = sequence.block_table[sequence.num_published : num_full]
        if fresh and blocks.prefix_caching and self._runner.cache.is_finite(fresh):
            self._scheduler.publish(sequence)

    def _note_scheduled(self, scheduled: list[Scheduled]) -> None:
        if not scheduled:
            return
        self._tally.count_step(len(scheduled), sum(item.num_tokens for item in scheduled))
        for item in scheduled:
            group = item.sequence.group
            if not group.first_step:
                group.first_step, group.scheduled_s = self._tally.num_steps, time.monotonic()

    def _sample(
        self, logits: Logits, sequences: list[Sequence], fail: isolation.Fail
    ) -> Iterator[Gain]:
        masks = []
        for sequence in sequences:
            mask = None
            try:
                if sequence.matcher is not None and sequence.status is Status.RUNNING:
                    mask = sequence.matcher.mask()
            except Exception as error:  # noqa: BLE001 -- as in isolation.forward
                fail(sequence, error)
            masks.append(mask)
        if sequences:
            yield from self._take(sequences, self._draw(logits, sequences, masks, fail), fail)

    def _draw(
        self,
        logits: Logits,
        sequences: list[Sequence],
        masks: list[isolation.Mask],
        fail: isolation.Fail,
    ) -> list[Sampled]:
        """One sample a row; the next step is launched meanwhile, where it can be."""
        rows = [sequence.row for sequence in sequences]
        try:
            launched = self.sampler.launch(logits, rows, masks)
            self._look_ahead(sequences, launched)
            return self.sampler.read(launched)
        except Exception as raised:  # noqa: BLE001 -- as in isolation.forward
            self._ahead = None
            isolation.understood(self._runner, raised)
        for row in rows:
            row.rewind()
        return isolation.draw(self._runner, self.sampler, logits, sequences, masks, fail)

    def _take(
        self, sequences: list[Sequence], samples: list[Sampled], fail: isolation.Fail
    ) -> Iterator[Gain]:
        """Give each sequence its token. Finite logits say the same of all keys and values before them."""
        for sequence, sample in zip(sequences, samples, strict=True):
            if sequence.status is not Status.RUNNING:
                continue  # it failed just now, or a sibling did and took it along
            try:
                delta = sequence.take(sample, self._eos_token_ids)
            except Exception as error:  # noqa: BLE001 -- as in isolation.forward
                fail(sequence, error)
            else:
                self._tally.num_generated_tokens += 1
                self._scheduler.publish(sequence)
                if delta.finish_reason is not None:
                    self._scheduler.finish(sequence)
                yield delta, sequence
