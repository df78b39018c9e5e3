"""Wire models of responses: OpenAI's own types, with the fields that Fathom and vLLM add.

Where a field is typed anew (a stream's `finish_reason` may be null, the first log-probability is),
the wire is what OpenAI's server sends; its published types are tighter than that.
"""

from typing import Literal

from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from server.engine.request import DepthSource, LoraSelection


class LoraReport(BaseModel):
    """Which adapter answered, and how deep it reached."""

    adapter: str | None
    depth: int
    num_layers: int
    source: DepthSource
    boundary_version: int | None

    @classmethod
    def of(cls, selection: LoraSelection) -> "LoraReport":
        """The report of a request's selection."""
        return cls(
            adapter=selection.adapter.name if selection.adapter else None,
            depth=selection.depth,
            num_layers=selection.num_layers,
            source=selection.source,
            boundary_version=selection.boundary_version,
        )


class PromptLogprob(BaseModel):
    """One candidate at one position of a prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TextLogprobs(Logprobs):
    """Parallel lists, one entry a token; null where nothing precedes the token."""

    tokens: list[str]
    text_offset: list[int]
    token_logprobs: list[float | None]  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None]  # type: ignore[assignment]


class TextChoice(CompletionChoice):
    """One completion, or a part of one."""

    finish_reason: Literal["stop", "length"] | None = None  # type: ignore[assignment]
    logprobs: TextLogprobs | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None


class TextCompletion(Completion):
    """Body of a completions response, and every chunk of a stream of one."""

    choices: list[TextChoice]  # type: ignore[assignment]
    lora: LoraReport | None = None


class AssistantMessage(ChatCompletionMessage):
    """What the model said, with its reasoning where the tokenizer can tell it apart."""

    reasoning_content: str | None = None


class ChatChoice(Choice):
    """One reply."""

    message: AssistantMessage
    stop_reason: int | str | None = None


class ChatResponse(ChatCompletion):
    """Body of a chat response."""

    choices: list[ChatChoice]  # type: ignore[assignment]
    lora: LoraReport
    prompt_logprobs: PromptLogprobs | None = None


class AssistantDelta(ChoiceDelta):
    """What a reply gained."""

    reasoning_content: str | None = None


class ChatChunkChoice(ChunkChoice):
    """What one reply gained."""

    delta: AssistantDelta
    stop_reason: int | str | None = None


class ChatChunk(ChatCompletionChunk):
    """One chunk of a chat stream."""

    choices: list[ChatChunkChoice]  # type: ignore[assignment]
    lora: LoraReport | None = None
