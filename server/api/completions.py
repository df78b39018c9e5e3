"""`POST /v1/completions`: prompts in, their continuations out.

The choice of prompt `p` and sequence `i` has index `p * n + i`. With `echo` a choice begins with
its prompt, and with `logprobs` as well the prompt's tokens are scored: with `max_tokens` 0 or 1
that is what evaluation harnesses call.
"""

import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Literal

from server.access.key import Grant
from server.api.job import (
    Outputs,
    check_combinations,
    engine_requests,
    response_id,
)
from server.api.logprobs import TextLogprobsWriter, prompt_logprobs
from server.api.prompts import EncodedPrompt, completion_prompts, fit
from server.api.responses import LoraReport, TextChoice, TextCompletion, TextLogprobs
from server.api.sampling import sampling_params
from server.api.schemas import CompletionRequest
from server.api.selection import select
from server.api.stream import Chunk
from server.api.structured import compiled, constraint
from server.api.text_frame import TextFrames
from server.api.token_text import TokenText
from server.api.usage import UsageTally
from server.config import Settings
from server.engine.protocol import Engine
from server.engine.request import Request, SequenceDelta, TokenLogprobs, joined

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""

PromptPositions = tuple[TokenLogprobs | None, ...]


async def completion_job(
    body: CompletionRequest, engine: Engine, settings: Settings, tokens: TokenText, grant: Grant
) -> "CompletionJob":
    """Validate a body against the model; raises before anything is queued."""
    check_combinations(body)
    prompts = await completion_prompts(engine, body, settings.max_num_waiting)
    grammar = await compiled(constraint(body.response_format, body.structured_outputs), engine)
    samplings = [
        sampling_params(
            body,
            settings,
            engine.info,
            max_tokens=fit(
                len(prompt.token_ids),
                body.max_tokens,
                engine.info.max_model_len,
                default=DEFAULT_MAX_TOKENS,
                prompt_param="prompt",
            ),
            grammar=grammar,
        )
        for prompt in prompts
    ]
    if body.logprobs is not None or body.prompt_logprobs is not None:
        await tokens.load()
    selection = await select(engine, body.model, body.lora_depth, grant)
    requests = engine_requests(
        "cmpl",
        zip((prompt.token_ids for prompt in prompts), samplings, strict=True),
        selection,
        body.priority,
    )
    return CompletionJob(body, prompts, requests, engine, tokens)


class CompletionJob:
    """One accepted completions body."""

    def __init__(
        self,
        body: CompletionRequest,
        prompts: list[EncodedPrompt],
        requests: list[Request],
        engine: Engine,
        tokens: TokenText,
    ) -> None:
        self.requests = requests
        self.is_stream = bool(body.stream)
        self._body = body
        self._lora = LoraReport.of(requests[0].lora)
        self._tokens = tokens
        self._created = int(time.time())
        self._usage = UsageTally([len(prompt.token_ids) for prompt in prompts])
        self._n = body.n or 1
        self._echoes_scores = bool(body.echo) and body.logprobs is not None
        self._writers = [
            _ChoiceWriter(p * self._n + i, body, prompt, engine, tokens)
            for p, prompt in enumerate(prompts)
            for i in range(self._n)
        ]
        self._frames = TextFrames()

    async def response(self, outputs: Outputs) -> TextCompletion:
        """Every choice, whole."""
        deltas: dict[int, list[SequenceDelta]] = defaultdict(list)
        scores: dict[int, PromptPositions] = {}
        async with aclosing(outputs):
            async for p, output in outputs:
                self._usage.add((p, output))
                if output.prompt_logprobs is not None:
                    scores[p] = output.prompt_logprobs
                for delta in output.deltas:
                    deltas[p * self._n + delta.index].append(delta)
        choices = []
        for writer in self._writers:
            positions = scores.get(writer.index // self._n)
            choice = writer.part(joined(deltas[writer.index]), positions)
            if self._body.prompt_logprobs is not None and positions is not None:
                choice.prompt_logprobs = prompt_logprobs(
                    self._tokens, positions, self._body.prompt_logprobs
                )
            choices.append(choice)
        return TextCompletion(
            id=response_id(self.requests),
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=choices,
            usage=self._usage.total(),
            lora=self._lora,
        )

    async def chunks(self, outputs: Outputs) -> AsyncGenerator[Chunk, None]:
        """A chunk for each thing a choice gains, then the usage where it is asked for."""
        scores: dict[int, PromptPositions] = {}
        waiting: dict[int, list[SequenceDelta]] = defaultdict(list)
        async for p, output in outputs:
            self._usage.add((p, output))
            if output.prompt_logprobs is not None:
                scores[p] = output.prompt_logprobs
            waiting[p] += output.deltas
            if p not in scores and self._echoes_scores:
                continue  # another sequence of this prompt still scores it
            for delta in waiting.pop(p):
                writer = self._writers[p * self._n + delta.index]
                if writer.has_text_alone(delta):
                    if delta.text:
                        yield self._text_chunk(writer, delta)
                    continue
                choice = writer.part(delta, scores.get(p))
                if choice.text or choice.logprobs or choice.finish_reason:
                    yield self._chunk(choice)
        if self._body.stream_options and self._body.stream_options.include_usage:
            last = self._chunk(None)
            last.usage = self._usage.total()
            last.lora = self._lora
            yield last

    def _text_chunk(self, writer: "_ChoiceWriter", delta: SequenceDelta) -> bytes:
        return self._frames.around(
            writer.index,
            delta.text,
            lambda text: self._chunk(writer.part(replace(delta, text=text), None)),
        )

    def _chunk(self, choice: TextChoice | None) -> TextCompletion:
        chunk = TextCompletion(
            id=response_id(self.requests),
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=[] if choice is None else [choice],
        )
        if choice is not None and choice.finish_reason is not None:
            chunk.lora = self._lora
        if self._body.stream_options and self._body.stream_options.include_usage:
            chunk.usage = None
        return chunk


class _ChoiceWriter:
    """One choice on its way to the wire; remembers whether its prompt was echoed."""

    def __init__(
        self,
        index: int,
        body: CompletionRequest,
        prompt: EncodedPrompt,
        engine: Engine,
        tokens: TokenText,
    ) -> None:
        self.index = index
        self._echo = prompt if body.echo else None
        self._tokenizer = engine.tokenizer
        self._skip_special = body.skip_special_tokens is not False
        self._logprobs = (
            None
            if body.logprobs is None
            else TextLogprobsWriter(tokens, body.logprobs, skips_special=self._skip_special)
        )

    def has_text_alone(self, delta: SequenceDelta) -> bool:
        """Whether the next `part` says text, and beside it what all such parts of this choice do."""
        return self._echo is None and self._logprobs is None and delta.finish_reason is None

    def part(self, delta: SequenceDelta, scores: PromptPositions | None) -> TextChoice:
        """What the choice gained, the echo of its prompt first."""
        echo, self._echo = self._echo, None
        echoed = "" if echo is None else self._echoed(echo)
        logprobs = None
        if self._logprobs is not None:  # most streams have none: this runs for every token
            logprobs = TextLogprobs(tokens=[], text_offset=[], token_logprobs=[], top_logprobs=[])
            if echo is not None:
                self._logprobs.echo(logprobs, echo.token_ids, scores or (), echoed)
            self._logprobs.write(logprobs, delta.token_ids, delta.logprobs)
        finish: Literal["stop", "length"] | None = None
        if delta.finish_reason is not None:
            finish = "length" if delta.finish_reason == "length" else "stop"
        return TextChoice(
            index=self.index,
            text=echoed + delta.text,
            logprobs=logprobs if logprobs is not None and logprobs.tokens else None,
            finish_reason=finish,
            stop_reason=delta.stop_reason,
        )

    def _echoed(self, prompt: EncodedPrompt) -> str:
        if prompt.text is not None:
            return prompt.text
        text = self._tokenizer.decode(
            list(prompt.token_ids), skip_special_tokens=self._skip_special
        )
        assert isinstance(text, str)
        return text
