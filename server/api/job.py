"""What completions and chat have in common between wire and engine.

A job is one validated body: the engine requests it comes to, and how their outputs become a whole
response or the chunks of a stream. Everything that can be refused is refused while it is made.
"""

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Protocol
from uuid import uuid4

from pydantic import BaseModel

from server.api.generation import IndexedOutput
from server.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from server.api.stream import Chunk
from server.engine.request import LoraSelection, Request, SamplingParams
from server.errors import BadRequest

Outputs = AsyncGenerator[IndexedOutput, None]


class Job(Protocol):
    """One accepted body."""

    requests: list[Request]
    is_stream: bool

    async def response(self, outputs: Outputs) -> BaseModel:
        """The whole response."""

    def chunks(self, outputs: Outputs) -> AsyncGenerator[Chunk, None]:
        """The chunks of a stream."""


def check_combinations(body: CompletionRequest | ChatRequest) -> None:
    """Refuse fields that contradict each other, whatever the model."""
    if body.stream_options is not None and not body.stream:
        raise BadRequest("'stream_options' needs 'stream' true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise BadRequest(
            "'prompt_logprobs' is not part of a stream; leave out 'stream'", param="prompt_logprobs"
        )
    scores = body.prompt_logprobs is not None or (
        isinstance(body, CompletionRequest) and bool(body.echo)
    )
    if wanted_tokens(body) == 0 and not scores:
        raise BadRequest(
            "'max_tokens' must be at least 1 unless 'echo' or 'prompt_logprobs' asks for the "
            "prompt (got 0)",
            param=max_tokens_param(body),
        )


def wanted_tokens(body: GenerationRequest) -> int | None:
    """`max_tokens`, also under the name that newer chat clients use."""
    if not isinstance(body, ChatRequest) or body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise BadRequest(
            f"'max_completion_tokens' ({body.max_completion_tokens}) and its old name 'max_tokens' "
            f"({body.max_tokens}) disagree",
            param="max_completion_tokens",
        )
    return body.max_completion_tokens


def max_tokens_param(body: GenerationRequest) -> str:
    """The name under which the client gave it."""
    is_new = isinstance(body, ChatRequest) and body.max_completion_tokens is not None
    return "max_completion_tokens" if is_new else "max_tokens"


def engine_requests(
    kind: str,
    prompts: Iterable[tuple[tuple[int, ...], SamplingParams]],
    selection: LoraSelection,
    priority: int | None,
) -> list[Request]:
    """One engine request a prompt; all share the id of the response, a new one."""
    shared_id = f"{kind}-{uuid4().hex}"
    arrival_s = time.monotonic()
    return [
        Request(
            id=f"{shared_id}-{index}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            lora=selection,
            priority=priority or 0,
            arrival_s=arrival_s,
        )
        for index, (token_ids, sampling) in enumerate(prompts)
    ]


def response_id(requests: Sequence[Request]) -> str:
    """The id on the wire of what these requests make."""
    return requests[0].id.rpartition("-")[0]
