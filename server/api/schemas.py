"""Wire models of requests: what a client may write, with every limit that needs no model to check.

Limits that depend on the model or the settings (`n`, token ids, context length) are checked where
the engine's request is made: `sampling.py` and `prompts.py`. OpenAI's `user` and `metadata` label a
request for its sender; they are accepted, bounded, and change nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from server.api.messages import Message
from server.api.strict import StrictModel
from server.api.structured import ResponseFormat, StructuredOutputs
from server.api.tools import Tool, ToolChoice

TokenIds = Annotated[list[int], Field(fail_fast=True)]
INT64_MAX = 2**63 - 1
MIN_REPETITION_PENALTY = 1e-6
"""Logits are divided by it: below this they come near the end of float32."""

_OPENAI_ONLY = {
    "best_of": "sample `n` and choose by `logprobs`",
    "service_tier": "there is one tier; use `priority`",
    "store": "nothing is stored",
    "safety_identifier": "use `user`",
    "prompt_cache_key": "equal prefixes are cached by their content",
}
_VLLM_ONLY = {
    "use_beam_search": "only sampling and greedy decoding",
    "length_penalty": "there is no beam search",
    "include_stop_str_in_output": "a stop string is never part of the text",
    "truncate_prompt_tokens": "a prompt is never cut",
    "allowed_token_ids": "use `structured_outputs`",
    "bad_words": "use `logit_bias`",
    "logits_processors": "use `logit_bias` or `structured_outputs`",
    "spaces_between_special_tokens": "the tokenizer decides",
    "return_tokens_as_token_ids": "use `/tokenize`",
    "return_token_ids": "use `/tokenize`",
    "cache_salt": "the cache is keyed by adapter, depth and tokens",
    "guided_json": "use `structured_outputs`",
    "guided_regex": "use `structured_outputs`",
    "guided_choice": "use `structured_outputs`",
    "guided_grammar": "use `structured_outputs`",
}


def _list_kind(value: Any) -> str | None:
    """Which form of prompt (or of `stop`) this is, judged by its first element."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if not value or isinstance(value[0], str):
        return "texts"
    return "ids" if isinstance(value[0], int) else "id_lists"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("id_lists")],
    Discriminator(
        _list_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, a list of token ids "
        "or a list of lists of token ids",
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[list[StopString], Field(max_length=64, fail_fast=True), Tag("texts")],
    Discriminator(
        _list_kind,
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or a list of strings",
    ),
]
Depth = Annotated[
    Annotated[int, Tag("int")] | Annotated[Literal["auto", "full"], Tag("word")],
    Discriminator(
        lambda value: "word" if isinstance(value, str) else "int",
    ),
]


class StreamOptions(StrictModel):
    """What a stream carries beside its chunks."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "continuous_usage_stats": "usage comes once, at the end",
        "include_obfuscation": "chunks carry no padding",
    }
    include_usage: bool = False


class GenerationRequest(StrictModel):
    """Fields that completions and chat share."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    lora_depth: Depth | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=10)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **_OPENAI_ONLY,
        **_VLLM_ONLY,
        "suffix": "the model completes to the right only",
    }

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **_OPENAI_ONLY,
        **_VLLM_ONLY,
        "functions": "use `tools`",
        "function_call": "use `tool_choice`",
        "audio": "text only",
        "modalities": "text only",
        "prediction": "there is no speculative decoding",
        "reasoning_effort": "the chat template decides",
        "verbosity": "ask for it in a message",
        "web_search_options": "there is no web search",
        "chat_template": "the tokenizer's own template is used",
        "chat_template_kwargs": "the tokenizer's own template is used as it is",
        "add_generation_prompt": "it is always added",
        "continue_final_message": "use `/v1/completions`",
        "documents": "put them into a message",
        "echo": "use `/v1/completions`",
    }

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
