"""Requests from `add` to their last output. One thread owns an `EngineCore` and all it holds.

Every `step` gives what they gained in it; what a step does is `stepper`'s. Knows no event loop and no HTTP.
"""

import time

import structlog

from server.config import Settings
from server.engine import isolation
from server.engine.block_manager import BlockManager, root_key
from server.engine.detokenizer import Detokenizer
from server.engine.grammar import GrammarCompiler
from server.engine.protocol import EngineStats, ModelInfo, PlaceCount
from server.engine.registry import AdapterRegistry
from server.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    SequenceDelta,
)
from server.engine.row_state import RowState
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, SequenceGroup, Status
from server.engine.stepper import Stepper
from server.engine.tally import Tally
from server.errors import BadRequest, Conflict, FathomError, GenerationError
from server.model.loader import LoadedModel, Progress
from server.model.prepare import prepare
from server.model.runner import ModelRunner
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
        self.tally = Tally()
        self.stepper = Stepper(
            runner,
            self.scheduler,
            Sampler(base.vocab_size, base.model.device),
            base.eos_token_ids,
            self.tally,
        )
        self._revision = base.revision
        self._eos_token_ids = base.eos_token_ids
        self._groups: dict[str, SequenceGroup] = {}
        self._num_arrived = 0

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
        for delta, sequence in self.stepper.step(self._failing(outputs)):
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
        self.stepper.forget()
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
