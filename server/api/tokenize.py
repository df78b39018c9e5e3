"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, in vLLM's shapes.

The answer of `/tokenize` is what a completion or chat with the same fields would be prompted with.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, ClassVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from server.access.key import Grant
from server.access.service import Access
from server.api import query
from server.api.auth import api_guard, caller, count_request
from server.api.body import json_body
from server.api.chat_template import render
from server.api.messages import Message
from server.api.openapi import body_of
from server.api.prompts import encode
from server.api.sampling import check_token_ids
from server.api.schemas import TokenIds
from server.api.selection import resolve
from server.api.strict import StrictModel
from server.api.tools import Tool
from server.config import Settings
from server.engine.protocol import Engine
from server.errors import BadRequest


class TokenizeRequest(StrictModel):
    """A text, or a conversation that the chat template renders."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "chat_template": "the tokenizer's own template is used",
        "chat_template_kwargs": "the tokenizer's own template is used as it is",
        "continue_final_message": "use `prompt`",
        "mm_processor_kwargs": "text only",
        "media_io_kwargs": "text only",
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template writes them."""
    return_token_strs: bool | None = None


class TokenizeResponse(BaseModel):
    """Token ids, and their strings where those are asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictModel):
    """Token ids."""

    model: str | None = None
    tokens: TokenIds


class DetokenizeResponse(BaseModel):
    """Their text, special tokens included."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client that has no tokenizer of its own must know of the model's."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


def tokenize_router(settings: Settings, engine: Engine, access: Access) -> APIRouter:
    """Routes that need an API key, where there is one."""
    router = APIRouter(dependencies=[Depends(api_guard(access)), Depends(count_request)])

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(
        http: Request,
        body: Annotated[
            TokenizeRequest, Depends(json_body(TokenizeRequest, settings.max_body_bytes))
        ],
    ) -> TokenizeResponse:
        """What a text or a conversation is to the model."""
        await _check_model(engine, body.model, caller(http).grant)
        text, is_chat = _text(engine, body)
        add_special_tokens = body.add_special_tokens
        if add_special_tokens is None:
            add_special_tokens = not is_chat
        token_ids = list(await encode(engine, text, add_special_tokens=add_special_tokens))
        strings = [*engine.tokenizer.convert_ids_to_tokens(token_ids)]
        return TokenizeResponse(
            count=len(token_ids),
            max_model_len=engine.info.max_model_len,
            tokens=token_ids,
            token_strs=strings if body.return_token_strs else None,
        )

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(
        http: Request,
        body: Annotated[
            DetokenizeRequest, Depends(json_body(DetokenizeRequest, settings.max_body_bytes))
        ],
    ) -> DetokenizeResponse:
        """Token ids back to text."""
        await _check_model(engine, body.model, caller(http).grant)
        check_token_ids(body.tokens, engine.info.vocab_size, "tokens")
        text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens)
        assert isinstance(text, str)
        return DetokenizeResponse(prompt=text)

    @router.get("/tokenizer_info")
    async def tokenizer_info(http: Request) -> TokenizerInfo:
        """Special tokens and the chat template: lm-evaluation-harness needs no tokenizer then."""
        query.check_names(http)
        tokenizer = engine.tokenizer
        template = tokenizer.chat_template
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            model_max_length=engine.info.max_model_len,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            unk_token=tokenizer.unk_token,
            chat_template=template if isinstance(template, str) else None,
        )

    return router


async def _check_model(engine: Engine, model: str | None, grant: Grant) -> None:
    """Adapters share the base model's tokenizer; a name that nobody knows is an error still."""
    if model is not None:
        await resolve(engine, model, None, grant)


def _text(engine: Engine, body: TokenizeRequest) -> tuple[str, bool]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either 'prompt' or 'messages'", param="prompt")
    if body.messages is None:
        assert body.prompt is not None
        for name in ("tools", "add_generation_prompt"):
            if getattr(body, name) is not None:
                raise BadRequest(f"'{name}' needs 'messages'", param=name)
        return body.prompt, False
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None
    return (
        render(
            engine.tokenizer,
            body.messages,
            tools,
            add_generation_prompt=body.add_generation_prompt is not False,
        ),
        True,
    )
