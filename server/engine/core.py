"""The step: schedule, run, sample, postprocess. One thread owns an `EngineCore` and all it holds.

Requests go in with `add`, and every `step` gives what they gained. Knows no event loop and no HTTP.
"""

import time
from collections.abc import Iterator

import structlog

from server.config import Settings
from server.engine import isolation
from server.engine.block_manager import BlockManager, root_key
from server.engine.detokenizer import Detokenizer
from server.engine.grammar import GrammarCompiler
from server.engine.lookahead import Ahead, rows_that_go_on
from server.engine.protocol import EngineStats, ModelInfo, PlaceCount
from server.engine.registry import AdapterRegistry
from server.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    SequenceDelta,
)
from server.engine.row_state import RowState
from server.engine.sampler import Launched, Sampled, Sampler
from server.engine.scheduled import Scheduled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, SequenceGroup, Status
from server.engine.tally import Tally
from server.errors import BadRequest, Conflict, FathomError, GenerationError
from server.model.batch import BatchedSequence
from server.model.loader import LoadedModel, Progress
from server.model.prepare import prepare
from server.model.runner import Logits, ModelRunner
from server.sources.fetcher import Fetcher

log = structlog.get_logger(__name__)


class EngineCore:
    """One base model, its adapters, its cache and the requests that run on them."""

    def __init__(
        self,
        base: LoadedModel,
        runner: ModelRunner,
        registry: AdapterRegistry,
        info: ModelInfo,
        settings: Settings,
    ) -> None:
        self.info = info
        self.tokenizer = base.tokenizer
        self.runner = runner
        self.registry = registry
        runner.slots.is_wanted = registry.is_current
        cache = runner.cache
        self.blocks = BlockManager(cache.num_blocks, cache.block_size, settings.prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            runner.slots,
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            keep_depth=registry.depths.usual if settings.resident_depth == "auto" else None,
        )
        self.grammars = GrammarCompiler(base.tokenizer, base.vocab_size, base.eos_token_ids)
        self._sampler = Sampler(base.vocab_size, base.model.device)
        self._ahead: Ahead | None = None
        """The next step, where the device was given it before this one's tokens were read."""
        self._revision = base.revision
        self._eos_token_ids = base.eos_token_ids
        self._groups: dict[str, SequenceGroup] = {}
        self._num_arrived = 0
        self.tally = Tally()

    @classmethod
    def from_settings(cls, settings: Settings, progress: Progress | None = None) -> "EngineCore":
        """Load the model and test it against itself. Raises ModelError; adapters come later."""
        prepared = prepare(settings, progress)
        base, runner = prepared.base, prepared.runner
        info = ModelInfo(
            name=settings.served_model_name or base.path.rstrip("/").rsplit("/", 1)[-1],
            path=base.path,
            num_layers=base.num_layers,
            vocab_size=base.vocab_size,
            max_model_len=prepared.max_model_len,
            created=int(time.time()),
            revision=base.revision,
        )
        registry = AdapterRegistry(
            runner.targets,
            base_name=info.name,
            base_revision=base.revision,
            adapter_root=settings.adapter_root,
            max_cpu_loras=settings.max_cpu_loras,
            max_lora_rank=settings.max_lora_rank,
            default_depth=settings.default_depth,
            fetcher=Fetcher.from_settings(settings),
            client_sources=settings.adapter_source,
        )
        return cls(base, runner, registry, info, settings)

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Accept a request. Raises BadRequest for one that could never finish; then nothing changed."""
        if request.id in self._groups:
            raise Conflict(f"request id {request.id!r} is in use")
        self._check(request)
        sampling = request.sampling
        group = SequenceGroup(request, self._num_arrived)
        key = root_key(self._revision, request.lora)
        for index in range(sampling.n):
            row = RowState(
                sampling,
                index,
                request.prompt_token_ids,
                self._eos_token_ids,
                self.info.vocab_size,
            )
            detokenizer = Detokenizer(
                self.tokenizer,
                request.prompt_token_ids,
                sampling.stop,
                sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
            )
            matcher = self.grammars.matcher(sampling.grammar) if sampling.grammar else None
            group.sequences.append(
                Sequence(group, index, key, self.blocks.block_size, row, detokenizer, matcher)
            )
        self._num_arrived += 1
        self.tally.num_prompt_tokens += len(request.prompt_token_ids)
        self._groups[request.id] = group
        for sequence in group.sequences:
            self.scheduler.add(sequence)

    def abort(self, request_id: str, error: FathomError | None = None) -> RequestOutput | None:
        """End a request now, perhaps for an error. Its last output, or None when it had ended already."""
        group = self._groups.get(request_id)
        return None if group is None else self._end(group, error)

    def step(self) -> list[RequestOutput]:
        """Run one step over every sequence that has room in it; one output a request that gained."""
        began_s, num_steps = time.monotonic(), self.tally.num_steps
        outputs: list[RequestOutput] = []
        gained: dict[str, list[SequenceDelta]] = {}
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            self.runner.slots.drop_unwanted()
        if ahead is not None and ahead.is_wanted:
            taken = self._catch_up(ahead, outputs)
        else:
            taken = self._run(outputs)
        for delta, sequence in taken:
            gained.setdefault(sequence.request.id, []).append(delta)
        for request_id, deltas in gained.items():
            group = self._groups.get(request_id)
            if group is not None:  # else another of its sequences failed in this very step
                outputs.append(self._output(group, tuple(deltas)))
        if self.tally.num_steps > num_steps:
            self.tally.steps.seconds.observe(time.monotonic() - began_s)
        return outputs

    def stats(self) -> EngineStats:
        """Counters as they stand."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free,
            block_size=self.blocks.block_size,
            num_cached_tokens=self.scheduler.num_cached_tokens,
            num_prompt_tokens=self.tally.num_prompt_tokens,
            num_generated_tokens=self.tally.num_generated_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            num_recomputed_tokens=self.scheduler.num_recomputed_tokens,
            num_steps=self.tally.num_steps,
            layers=self.tally.layers,
            resident_depths=self.runner.slots.resident_depths,
            lora_bytes=self.runner.slots.num_bytes,
            num_looked_up_tokens=self.scheduler.num_looked_up_tokens,
        )

    def device_count(self) -> PlaceCount:
        """Adapters on the device. Any thread may ask."""
        slots = self.runner.slots
        return PlaceCount(slots.num_resident, slots.num_loads, slots.num_evictions)

    def close(self) -> list[RequestOutput]:
        """Abort what is left and take the hooks off the model."""
        self._ahead = None
        outputs = [self.abort(request_id) for request_id in list(self._groups)]
        self.runner.close()
        self.grammars.close()
        return [output for output in outputs if output is not None]

    def _check(self, request: Request) -> None:
        prompt, limit = request.prompt_token_ids, self.info.max_model_len
        if not prompt:
            raise BadRequest("the prompt is empty: at least one token is needed", param="prompt")
        for token_id in prompt:
            if not 0 <= token_id < self.info.vocab_size:
                raise BadRequest(
                    f"token id {token_id} is outside the vocabulary of {self.info.vocab_size}",
                    param="prompt",
                )
        if request.sampling.n < 1:
            raise BadRequest(f"n must be at least 1; got {request.sampling.n}", param="n")
        if len(prompt) + request.sampling.max_tokens > limit:
            raise BadRequest(
                f"{len(prompt)} prompt tokens and max_tokens={request.sampling.max_tokens} are over "
                f"the model's limit of {limit} tokens",
                param="max_tokens",
            )

    def _run(self, outputs: list[RequestOutput]) -> Iterator[tuple[SequenceDelta, Sequence]]:
        """Schedule a step, run it, and give each sequence what it gained."""
        scheduled = self.scheduler.schedule()
        self._note_scheduled(scheduled)
        fail = self._failing(outputs)
        for sequence, error in self.scheduler.failed:
            fail(sequence, isolation.understood(self.runner, error))
        for logits, items in isolation.forward(self.runner, scheduled, fail):
            yield from self._postprocess(logits, items, fail)

    def _catch_up(
        self, ahead: Ahead, outputs: list[RequestOutput]
    ) -> Iterator[tuple[SequenceDelta, Sequence]]:
        """The same for a step that runs already. Rows whose sequences have ended meanwhile are dropped."""
        going_on = [each for each in ahead.sequences if each.status is Status.RUNNING]
        for sequence in going_on:
            self.scheduler.computed(sequence, 1)
        self._look_ahead(ahead.sequences, ahead.launched)
        try:
            samples = self._sampler.read(ahead.launched)
        except Exception as error:  # noqa: BLE001 -- as in isolation.forward
            self._ahead = None
            isolation.understood(self.runner, error)
            # As if it had not run: the step that runs now finds who is at fault.
            for sequence in going_on:
                sequence.num_computed -= 1
                sequence.row.rewind()
            yield from self._run(outputs)
        else:
            self.tally.count_step(len(ahead.sequences), len(ahead.sequences))
            for sequence in going_on:
                self.tally.count_layers(sequence.request.lora, 1)
            yield from self._take(ahead.sequences, samples, self._failing(outputs))

    def _look_ahead(self, sequences: list[Sequence], launched: Launched) -> None:
        """Launch the step after the one just launched, if it needs nothing that the host would read."""
        rows = rows_that_go_on(self.scheduler, sequences) if self.runner.runs_ahead else []
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
            ran = self.runner.run_ahead(batch, launched.token_ids, rows)
            if ran is not None:
                logits, order = ran
                ordered = [going_on[index] for index in order]
                states = [sequence.row for sequence in ordered]
                drawn = self._sampler.launch(logits, states, [None] * len(states))
                self._ahead = Ahead(ordered, drawn)
        except Exception as error:  # noqa: BLE001 -- the step is run again, which finds whose fault it is
            for sequence in going_on:
                sequence.row.rewind(1)
            log.warning("a step could not be run ahead", error=error)

    def _postprocess(
        self, logits: Logits, items: list[Scheduled], fail: isolation.Fail
    ) -> Iterator[tuple[SequenceDelta, Sequence]]:
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
            self.scheduler.computed(sequence, item.num_tokens)
            self.tally.count_layers(sequence.request.lora, item.num_tokens)
            if is_last_chunk and sequence.request.sampling.max_tokens == 0:
                self._share_chunk(sequence)
                self.scheduler.finish(sequence)
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
        num_full = sequence.num_computed // self.blocks.block_size
        fresh = sequence.block_table[sequence.num_published : num_full]
        if fresh and self.blocks.prefix_caching and self.runner.cache.is_finite(fresh):
            self.scheduler.publish(sequence)

    def _note_scheduled(self, scheduled: list[Scheduled]) -> None:
        if not scheduled:
            return
        self.tally.count_step(len(scheduled), sum(item.num_tokens for item in scheduled))
        for item in scheduled:
            group = item.sequence.group
            if not group.first_step:
                group.first_step, group.scheduled_s = self.tally.num_steps, time.monotonic()

    def _sample(
        self, logits: Logits, sequences: list[Sequence], fail: isolation.Fail
    ) -> Iterator[tuple[SequenceDelta, Sequence]]:
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
            launched = self._sampler.launch(logits, rows, masks)
            self._look_ahead(sequences, launched)
            return self._sampler.read(launched)
        except Exception as raised:  # noqa: BLE001 -- as in isolation.forward
            self._ahead = None
            isolation.understood(self.runner, raised)
        for row in rows:
            row.rewind()
        return isolation.draw(self.runner, self._sampler, logits, sequences, masks, fail)

    def _take(
        self, sequences: list[Sequence], samples: list[Sampled], fail: isolation.Fail
    ) -> Iterator[tuple[SequenceDelta, Sequence]]:
        """Give each sequence its token. Finite logits say the same of all keys and values before them."""
        for sequence, sample in zip(sequences, samples, strict=True):
            if sequence.status is not Status.RUNNING:
                continue  # it failed just now, or a sibling did and took it along
            try:
                delta = sequence.take(sample, self._eos_token_ids)
            except Exception as error:  # noqa: BLE001 -- as in isolation.forward
                fail(sequence, error)
            else:
                self.tally.num_generated_tokens += 1
                self.scheduler.publish(sequence)
                if delta.finish_reason is not None:
                    self.scheduler.finish(sequence)
                yield delta, sequence

    def _failing(self, outputs: list[RequestOutput]) -> isolation.Fail:
        """Ends a sequence's request, once, with an output of its own."""

        def fail(sequence: Sequence, error: Exception) -> None:
            if sequence.status is Status.FINISHED:
                return
            log.warning("request failed", request=sequence.request.id, error=error, exc_info=error)
            if not isinstance(error, FathomError):
                error = GenerationError(str(error) or repr(error))
            for other in sequence.group.sequences:
                self.scheduler.distrust(other)
            outputs.append(self._end(sequence.group, error))

        return fail

    def _end(self, group: SequenceGroup, error: FathomError | None = None) -> RequestOutput:
        reason: FinishReason = "abort" if error is None else "error"
        deltas = tuple(
            SequenceDelta(sequence.index, text=sequence.held_text(), finish_reason=reason)
            for sequence in group.sequences
            if sequence.status is not Status.FINISHED
        )
        for sequence in group.sequences:
            self.scheduler.finish(sequence)
        return self._output(group, deltas, error)

    def _output(
        self,
        group: SequenceGroup,
        deltas: tuple[SequenceDelta, ...],
        error: FathomError | None = None,
    ) -> RequestOutput:
        output = group.output(deltas, error, self.tally.num_steps)
        if output.finished:
            del self._groups[group.request.id]
        return output
