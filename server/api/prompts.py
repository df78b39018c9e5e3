"""Text -> token ids, and the check that a prompt and its completion fit the model's context.

The tokenizer holds the interpreter for half a microsecond a character, so long texts are encoded on
a worker thread and the event loop goes on.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from server.api.sampling import check_token_ids
from server.api.schemas import CompletionRequest
from server.engine.protocol import Engine
from server.errors import BadRequest

MAX_INLINE_CHARS = 4096
"""Longer texts are encoded on a worker thread: this many take about 8 ms on a slow core."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the engine takes it, and as an echo repeats it."""

    token_ids: tuple[int, ...]
    text: str | None
    """None where the client gave token ids."""


async def encode(engine: Engine, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids of a text."""

    def tokenize() -> tuple[int, ...]:
        return tuple(engine.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    return tokenize() if len(text) <= MAX_INLINE_CHARS else await asyncio.to_thread(tokenize)


async def completion_prompts(
    engine: Engine, body: CompletionRequest, max_prompts: int
) -> list[EncodedPrompt]:
    """The prompts of one request, in order; raises BadRequest for an empty or impossible one."""
    prompts = _as_list(body.prompt)
    if not prompts:
        raise BadRequest("'prompt' is empty: at least one prompt is needed", param="prompt")
    if len(prompts) > max_prompts:
        raise BadRequest(
            f"'prompt' holds more prompts than the limit of {max_prompts} (got {len(prompts)})",
            param="prompt",
        )
    is_batch = len(prompts) > 1
    encoded = []
    for position, prompt in enumerate(prompts):
        param = f"prompt[{position}]" if is_batch else "prompt"
        if not prompt:
            raise BadRequest(f"'{param}' is empty: at least one token is needed", param=param)
        if isinstance(prompt, str):
            token_ids = await encode(
                engine, prompt, add_special_tokens=body.add_special_tokens is not False
            )
            encoded.append(EncodedPrompt(token_ids, prompt))
        else:
            if body.add_special_tokens is not None:
                raise BadRequest(
                    "'add_special_tokens' is for text prompts; this one is token ids",
                    param="add_special_tokens",
                )
            check_token_ids(prompt, engine.info.vocab_size, param)
            encoded.append(EncodedPrompt(tuple(prompt), None))
        if not encoded[-1].token_ids:
            raise BadRequest(f"'{param}' is empty: it encodes to no token", param=param)
    return encoded


def fit(
    num_prompt_tokens: int,
    max_tokens: int | None,
    max_model_len: int,
    *,
    default: int | None,
    prompt_param: str,
    max_tokens_param: str = "max_tokens",
) -> int:
    """`max_tokens` as the engine takes it: the client's, or as much of `default` as fits.

    A `default` of None is all the room. What a client gave is never cut: it fits or is refused.
    """
    room = max_model_len - num_prompt_tokens
    if room < (0 if max_tokens == 0 else 1):
        raise BadRequest(
            f"'{prompt_param}' leaves no room for a completion: the model's context is "
            f"{max_model_len} tokens (got a prompt of {num_prompt_tokens})",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if max_tokens is None:
        return room if default is None else min(default, room)
    if max_tokens > room:
        raise BadRequest(
            f"'{max_tokens_param}' is over the room that is left: the model's context is "
            f"{max_model_len} tokens, the prompt has {num_prompt_tokens}, so at most {room} remain "
            f"(got {max_tokens})",
            param=max_tokens_param,
            code="context_length_exceeded",
        )
    return max_tokens


def _as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids:
        return [ids]
    return [item for item in prompt if not isinstance(item, int)]
