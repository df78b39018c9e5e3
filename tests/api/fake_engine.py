"""An engine without a model: it echoes the prompt, or says what a test gives it, token by token.

Stands in at `server.engine.protocol.Engine`. A test can hold it (`hold_after`), fail it, kill it, and
read which requests came and which were aborted.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

from llguidance import LLMatcher, LLTokenizer, hf
from transformers import PreTrainedTokenizerFast

from server.engine.distribution import Distribution
from server.engine.protocol import (
    AdapterCounts,
    EngineStats,
    LayerCount,
    MakeSlices,
    ModelInfo,
    PlaceCount,
    Residency,
    StepCounts,
)
from server.engine.request import (
    AdapterRef,
    CalibratedDepth,
    LoraSelection,
    Request,
    RequestOutput,
    SequenceDelta,
    TokenLogprobs,
)
from server.errors import AdapterError, BadRequest, Conflict, EngineDead, FathomError, NotFound

NUM_LAYERS = 12
CALIBRATED_S = 1_700_000_000.0
Slices = Callable[[Callable[[Any], None]], Awaitable[Any]]
Reply = Callable[[Request, int], str]
"""What sequence `index` of a request says."""


class FakeEngine:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, max_model_len: int = 512) -> None:
        self.tokenizer = tokenizer
        self.info = ModelInfo(
            name="base",
            path="/models/base",
            num_layers=NUM_LAYERS,
            vocab_size=len(tokenizer) + 5,
            max_model_len=max_model_len,
            created=1_700_000_000,
            revision="sha256:base",
        )
        self.is_alive = True
        self.reply: Reply | None = None
        self.hold_after: int | None = None
        """Tokens after which every sequence waits for `released`."""
        self.released = asyncio.Event()
        self.held = asyncio.Event()
        self.scheduled_s = 0.0
        """Seconds after its arrival at which each request is scheduled."""
        self.score_at = 0
        """Step whose output carries the prompt's scores."""
        self.fail_after: int | None = None
        self.error: FathomError | None = None
        self.refusal: FathomError | None = None
        """Raised before the first output, as QueueFull is."""
        self.bug: Exception | None = None
        self.bug_after = 0
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.ended = asyncio.Event()
        """Set whenever an iterator has been closed or has ended."""
        self.slices: Slices | None = None
        """What work between steps does and returns; without it there is no such work."""
        self.steps = StepCounts(*(Distribution((1, 10)) for _ in range(3)))
        self.calibrations = {"tuned": CalibratedDepth(7, 3, CALIBRATED_S)}
        self._uids = count(1)
        self._adapters: dict[str, AdapterRef] = {}
        for name, max_depth in (("tuned", 12), ("plain", 10)):
            self._adapters[name] = self._ref(name, Path(f"/adapters/{name}"), max_depth)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=2,
            num_waiting=3,
            num_blocks=100,
            num_free_blocks=75,
            block_size=16,
            num_cached_tokens=11,
            num_prompt_tokens=22,
            num_generated_tokens=33,
            num_preemptions=1,
            num_recomputed_tokens=7,
            num_steps=44,
            layers=LayerCount(applied=55, skipped=66),
            num_looked_up_tokens=20,
        )

    def layer_counts(self) -> Mapping[str, LayerCount]:
        return {"tuned": LayerCount(applied=55, skipped=66)}

    def step_counts(self) -> StepCounts:
        return self.steps

    def adapter_counts(self) -> AdapterCounts:
        return AdapterCounts(PlaceCount(1, 4, 3), PlaceCount(2, 5, 0), len(self._adapters))

    def adapter(self, name: str) -> AdapterRef | None:
        return self._adapters.get(name)

    def adapters(self) -> list[AdapterRef]:
        return sorted(self._adapters.values(), key=lambda adapter: adapter.name)

    def residency(self, adapter: AdapterRef) -> Residency:
        return "host"

    def calibrated_depth(self, adapter: AdapterRef) -> CalibratedDepth | None:
        return self.calibrations.get(adapter.name)

    def set_calibrated_depths(self, depths: Mapping[str, CalibratedDepth | None]) -> None:
        self.calibrations = {
            adapter.name: found
            for adapter in self.adapters()
            if (found := depths.get(adapter.digest)) is not None
        }

    async def resolve(self, name: str) -> AdapterRef:
        if name not in self._adapters:
            raise NotFound(f"the model {name!r} does not exist", param="model")
        return self._adapters[name]

    async def run_slices(self, make: MakeSlices, on_progress: Callable[[Any], None]) -> Any:
        if self.slices is None:
            raise EngineDead("a fake has no device to calibrate on")
        return await self.slices(on_progress)

    async def select(
        self, model: str, depth: int | Literal["auto", "full"] | None
    ) -> LoraSelection:
        if model == self.info.name:
            if depth not in (None, 0, "auto"):
                raise BadRequest(
                    f"lora_depth must be 0 on the base model (got {depth})", param="lora_depth"
                )
            return LoraSelection(None, 0, NUM_LAYERS, "base")
        if model not in self._adapters:
            raise NotFound(
                f"the model '{model}' does not exist", param="model", code="model_not_found"
            )
        adapter = self._adapters[model]
        if isinstance(depth, int):
            if not 0 <= depth <= NUM_LAYERS:
                raise BadRequest(
                    f"lora_depth must be in 0..{NUM_LAYERS} (got {depth})", param="lora_depth"
                )
            return LoraSelection(adapter, depth, NUM_LAYERS, "request")
        record = self.calibrations.get(model)
        if depth == "full" or record is None:
            return LoraSelection(adapter, NUM_LAYERS, NUM_LAYERS, "full")
        return LoraSelection(adapter, record.depth, NUM_LAYERS, "calibrated", record.version)

    async def load_adapter(self, name: str, path: Path, *, replace: bool = False) -> AdapterRef:
        if name in self._adapters and not replace:
            raise Conflict(f"adapter '{name}' exists", param="lora_name")
        if path.name == "missing":
            raise NotFound(f"no adapter at {path}", param="lora_path")
        if path.name == "corrupt":
            raise AdapterError("tensor 'lora_A' holds NaN", param="lora_path")
        self._adapters[name] = self._ref(name, path, NUM_LAYERS)
        return self._adapters[name]

    async def unload_adapter(self, name: str) -> None:
        if self._adapters.pop(name, None) is None:
            raise NotFound(f"adapter '{name}' is not loaded", param="lora_name")

    def end_all(self, error: FathomError) -> None:
        self.refusal = self.error = error
        self.fail_after = self.hold_after
        self.released.set()

    async def check_grammar(self, grammar: str) -> None:
        if problem := LLMatcher.validate_grammar(grammar, _grammar_tokenizer(self.tokenizer)):
            raise BadRequest(problem)

    def allows(self, text: str) -> bool:
        """Whether the grammar of the last request allows exactly this text."""
        grammar = self.requests[-1].sampling.grammar
        assert grammar is not None
        matcher = LLMatcher(_grammar_tokenizer(self.tokenizer), grammar)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        if not self.is_alive:
            raise EngineDead("the engine has stopped")
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        is_finished = False
        try:
            async for output in self._outputs(request):
                is_finished = output.finished
                yield output
        finally:
            if not is_finished:
                self.aborted.append(request.id)
            self.ended.set()

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        sampling = request.sampling
        sequences = [self._tokens_of(request, index) for index in range(sampling.n)]
        texts = [_Pieces(self.tokenizer, sampling.skip_special_tokens) for _ in sequences]
        scores = _prompt_scores(request) if sampling.prompt_logprobs is not None else None
        num_output = 0
        for step in range(max(sampling.max_tokens, 1)):
            if step == self.hold_after:
                self.held.set()
                await self.released.wait()
            if step == self.fail_after:
                # As the engine says it when all end: without a word of how far this one came.
                yield RequestOutput(request.id, finished=True, error=self.error)
                return
            if self.bug is not None and step >= self.bug_after:
                raise self.bug
            deltas = []
            for index, token_ids in enumerate(sequences):
                if step >= max(len(token_ids), 1):
                    continue
                token = token_ids[step : step + 1]
                num_output += len(token)
                is_last = step + 1 >= len(token_ids)
                is_cut = len(token_ids) == sampling.max_tokens
                deltas.append(
                    SequenceDelta(
                        index=index,
                        text=texts[index].add(token, is_last=is_last),
                        token_ids=token,
                        logprobs=()
                        if sampling.logprobs is None
                        else tuple(_score(i, sampling.logprobs) for i in token),
                        finish_reason=("length" if is_cut else "stop") if is_last else None,
                    )
                )
            is_finished = step + 1 >= max(len(token_ids) for token_ids in sequences)
            yield self._output(
                request,
                tuple(deltas),
                num_output,
                is_finished,
                scores=scores if step == self.score_at else None,
            )
            if is_finished:
                return
            await asyncio.sleep(0)

    def _tokens_of(self, request: Request, index: int) -> tuple[int, ...]:
        if self.reply is None:
            token_ids = request.prompt_token_ids
            token_ids *= request.sampling.max_tokens // len(token_ids) + 1
        else:
            text = self.reply(request, index)
            token_ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return token_ids[: request.sampling.max_tokens]

    def _output(
        self,
        request: Request,
        deltas: tuple[SequenceDelta, ...],
        num_output: int,
        finished: bool,
        *,
        scores: tuple[TokenLogprobs | None, ...] | None = None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=request.id,
            deltas=deltas,
            prompt_logprobs=scores,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=len(request.prompt_token_ids) // 2,
            num_output_tokens=num_output,
            scheduled_s=request.arrival_s + self.scheduled_s,
            first_step=1,
            step=1 + num_output // request.sampling.n,
            finished=finished,
        )

    def _ref(self, name: str, path: Path, max_depth: int) -> AdapterRef:
        return AdapterRef(
            name=name,
            uid=next(self._uids),
            digest=f"sha256:{name}",
            rank=8,
            max_depth=max_depth,
            num_bytes=1024,
            path=str(path),
            modules=("q_proj", "v_proj"),
            layers=tuple(range(max_depth)),
        )


@cache
def _grammar_tokenizer(tokenizer: PreTrainedTokenizerFast) -> LLTokenizer:
    return hf.from_tokenizer(tokenizer, slices=[])


class _Pieces:
    """Text by token; part of a character is held back, as the real detokenizer does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._held: list[int] = []

    def add(self, token_ids: tuple[int, ...], *, is_last: bool) -> str:
        self._held += token_ids
        text = self._tokenizer.decode(self._held, skip_special_tokens=self._skip_special)
        if text.endswith("\ufffd") and not is_last:
            return ""
        self._held = []
        return text


def _score(token_id: int, num_top: int) -> TokenLogprobs:
    """The token is the second most likely: the next id is the first."""
    ranked = [(token_id + 1, -0.25), (token_id, -0.5)]
    ranked += [(token_id + 2 + i, -1.0 - i) for i in range(num_top)]
    return TokenLogprobs(token_id, -0.5, 2, tuple(ranked[:num_top]))


def _prompt_scores(request: Request) -> tuple[TokenLogprobs | None, ...]:
    num_top = request.sampling.prompt_logprobs or 0
    return (None, *(_score(token_id, num_top) for token_id in request.prompt_token_ids[1:]))
