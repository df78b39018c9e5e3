"""`POST /v1/chat/completions`: a conversation in, replies out."""

import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs

from server.access.key import Grant
from server.api.assistant import AssistantParser, MessageDelta, assistant_parser, reads_replies
from server.api.chat_template import render
from server.api.job import (
    Outputs,
    check_combinations,
    engine_requests,
    max_tokens_param,
    response_id,
    wanted_tokens,
)
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.prompts import encode, fit
from server.api.reply import Reply, call_delta, whole_calls
from server.api.responses import (
    AssistantDelta,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatResponse,
    LoraReport,
)
from server.api.sampling import sampling_params
from server.api.schemas import ChatRequest
from server.api.selection import select
from server.api.stream import Chunk
from server.api.structured import compiled, constraint
from server.api.text_frame import TextFrames
from server.api.token_text import TokenText
from server.api.tools import tool_use
from server.api.usage import UsageTally
from server.config import Settings
from server.engine.protocol import Engine
from server.engine.request import Request, SequenceDelta, TokenLogprobs, joined
from server.errors import BadRequest


async def chat_job(
    body: ChatRequest, engine: Engine, settings: Settings, tokens: TokenText, grant: Grant
) -> "ChatJob":
    """Validate a body against the model; raises before anything is queued."""
    check_combinations(body)
    can_parse = reads_replies(engine.tokenizer)
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, can_parse=can_parse)
    stated = constraint(body.response_format, body.structured_outputs)
    forced = use.constraint()
    if stated and forced:
        raise BadRequest(
            f"'{stated[0]}' and 'tool_choice' both constrain the output: give one",
            param="tool_choice",
        )
    prompt = render(engine.tokenizer, body.messages, use.for_template())
    token_ids = await encode(engine, prompt, add_special_tokens=bool(body.add_special_tokens))
    if not token_ids:
        raise BadRequest("'messages' render to an empty prompt", param="messages")
    is_constrained = bool(stated or forced)
    sampling = sampling_params(
        body,
        settings,
        engine.info,
        max_tokens=fit(
            len(token_ids),
            wanted_tokens(body),
            engine.info.max_model_len,
            default=None,
            prompt_param="messages",
            max_tokens_param=max_tokens_param(body),
        ),
        grammar=await compiled(stated or forced, engine),
        keep_special_tokens=can_parse and not is_constrained,
    )
    if sampling.logprobs is not None or sampling.prompt_logprobs is not None:
        await tokens.load()
    selection = await select(engine, body.model, body.lora_depth, grant)
    parsers = [
        assistant_parser(engine.tokenizer, prompt, use, is_constrained=is_constrained)
        for _ in range(sampling.n)
    ]
    requests = engine_requests("chatcmpl", [(token_ids, sampling)], selection, body.priority)
    return ChatJob(body, parsers, requests, tokens)


class ChatJob:
    """One accepted chat body."""

    def __init__(
        self,
        body: ChatRequest,
        parsers: list[AssistantParser],
        requests: list[Request],
        tokens: TokenText,
    ) -> None:
        self.requests = requests
        self.is_stream = bool(body.stream)
        self._body = body
        self._lora = LoraReport.of(requests[0].lora)
        self._tokens = tokens
        self._created = int(time.time())
        self._usage = UsageTally([len(requests[0].prompt_token_ids)])
        self._replies = [Reply(parser) for parser in parsers]
        self._frames = TextFrames()

    async def response(self, outputs: Outputs) -> ChatResponse:
        """Every reply, whole."""
        deltas: dict[int, list[SequenceDelta]] = defaultdict(list)
        scores: tuple[TokenLogprobs | None, ...] | None = None
        async with aclosing(outputs):
            async for indexed in outputs:
                self._usage.add(indexed)
                scores = indexed[1].prompt_logprobs or scores
                for delta in indexed[1].deltas:
                    deltas[delta.index].append(delta)
        response = ChatResponse(
            id=response_id(self.requests),
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=[
                self._choice(index, reply, deltas[index])
                for index, reply in enumerate(self._replies)
            ],
            usage=self._usage.total(),
            lora=self._lora,
        )
        if self._body.prompt_logprobs is not None and scores is not None:
            response.prompt_logprobs = prompt_logprobs(
                self._tokens, scores, self._body.prompt_logprobs
            )
        return response

    async def chunks(self, outputs: Outputs) -> AsyncGenerator[Chunk, None]:
        """The role of each reply, what each gains, then the usage where it is asked for."""
        for index in range(len(self._replies)):
            yield self._chunk(
                ChatChunkChoice(
                    index=index,
                    delta=AssistantDelta(role="assistant", content=""),
                    logprobs=None,
                    finish_reason=None,
                )
            )
        async for indexed in outputs:
            self._usage.add(indexed)
            for delta in indexed[1].deltas:
                chunk = self._gain(self._replies[delta.index], delta)
                if chunk is not None:
                    yield chunk
        if self._body.stream_options and self._body.stream_options.include_usage:
            last = self._chunk(None)
            last.usage = self._usage.total()
            last.lora = self._lora
            yield last

    def _choice(self, index: int, reply: Reply, deltas: list[SequenceDelta]) -> ChatChoice:
        gained = MessageDelta()
        for piece in deltas:  # as a stream reads them, so that both say the same
            gained += reply.read(piece)
        delta = joined(deltas)
        calls = whole_calls(gained.calls)
        message = AssistantMessage(
            role="assistant", content=gained.content or (None if calls else ""), refusal=None
        )
        if gained.reasoning:
            message.reasoning_content = gained.reasoning
        if calls:
            message.tool_calls = list(calls)
        choice = ChatChoice(
            index=index,
            message=message,
            logprobs=None,
            finish_reason=reply.finish_reason(delta) or "stop",
            stop_reason=delta.stop_reason,
        )
        if self._body.logprobs:
            choice.logprobs = ChoiceLogprobs(
                content=chat_logprobs(self._tokens, delta.logprobs, self._body.top_logprobs or 0),
                refusal=None,
            )
        return choice

    def _gain(self, reply: Reply, delta: SequenceDelta) -> Chunk | None:
        gained = reply.read(delta)
        says_more = gained.reasoning or gained.calls or self._has_logprobs(delta)
        if says_more or delta.finish_reason is not None:
            return self._chunk(self._part(reply, delta, gained))
        if not gained.content:
            return None
        return self._frames.around(
            delta.index,
            gained.content,
            lambda text: self._chunk(self._part(reply, delta, MessageDelta(text))),
        )

    def _has_logprobs(self, delta: SequenceDelta) -> bool:
        return bool(self._body.logprobs and delta.logprobs)

    def _part(self, reply: Reply, delta: SequenceDelta, gained: MessageDelta) -> ChatChunkChoice:
        message = AssistantDelta()
        if gained.content:
            message.content = gained.content
        if gained.reasoning:
            message.reasoning_content = gained.reasoning
        if gained.calls:
            message.tool_calls = [call_delta(call) for call in gained.calls]
        choice = ChatChunkChoice(
            index=delta.index,
            delta=message,
            logprobs=None,
            finish_reason=reply.finish_reason(delta),
        )
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        if self._has_logprobs(delta):
            choice.logprobs = ChunkLogprobs(
                content=chat_logprobs(self._tokens, delta.logprobs, self._body.top_logprobs or 0),
                refusal=None,
            )
        return choice

    def _chunk(self, choice: ChatChunkChoice | None) -> ChatChunk:
        chunk = ChatChunk(
            id=response_id(self.requests),
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=[] if choice is None else [choice],
        )
        if choice is not None and choice.finish_reason is not None:
            chunk.lora = self._lora
        if self._body.stream_options and self._body.stream_options.include_usage:
            chunk.usage = None
        return chunk
