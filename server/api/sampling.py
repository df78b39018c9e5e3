"""Wire fields -> `SamplingParams`, with the limits that depend on the model and the settings."""

from collections.abc import Sequence

from server.api.json_text import shown
from server.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from server.config import Settings
from server.engine.protocol import ModelInfo
from server.engine.request import SamplingParams
from server.errors import BadRequest

MIN_TEMPERATURE = 1e-6
"""Below this, logits divided by the temperature overflow float32; greedy is written as 0."""


def sampling_params(
    body: GenerationRequest,
    settings: Settings,
    info: ModelInfo,
    *,
    max_tokens: int,
    grammar: str | None,
    keep_special_tokens: bool = False,
) -> SamplingParams:
    """Everything but the prompt; raises BadRequest naming field, limit and value.

    `keep_special_tokens` is for a parser of the reply, which looks for them.
    """
    _check_at_most("n", body.n, settings.max_n)
    _check_at_most("prompt_logprobs", body.prompt_logprobs, settings.max_logprobs)
    _check_at_most("min_tokens", body.min_tokens, max_tokens, "max_tokens")
    if body.temperature is not None and 0 < body.temperature < MIN_TEMPERATURE:
        raise BadRequest(
            f"'temperature' must be 0 (greedy) or at least {MIN_TEMPERATURE} "
            f"(got {body.temperature})",
            param="temperature",
        )
    stop_token_ids = tuple(body.stop_token_ids or ())
    check_token_ids(stop_token_ids, info.vocab_size, "stop_token_ids")
    logprobs = _logprobs(body)
    _check_at_most(
        "top_logprobs" if isinstance(body, ChatRequest) else "logprobs",
        logprobs,
        settings.max_logprobs,
    )
    top_k = body.top_k or 0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=top_k if 0 < top_k < info.vocab_size else 0,
        min_p=body.min_p or 0.0,
        seed=body.seed,
        n=body.n or 1,
        stop=_stop(body),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body, info.vocab_size),
        logprobs=logprobs,
        prompt_logprobs=_prompt_logprobs(body),
        skip_special_tokens=body.skip_special_tokens is not False and not keep_special_tokens,
        grammar=grammar,
    )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Every id is a row of the model's output matrix."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise BadRequest(
                f"'{param}[{position}]' is outside the vocabulary 0..{vocab_size - 1} "
                f"(got {token_id})",
                param=param,
            )


def _check_at_most(
    param: str, value: int | None, limit: int, limit_name: str = "the limit"
) -> None:
    if value is not None and value > limit:
        raise BadRequest(f"'{param}' is over {limit_name} of {limit} (got {value})", param=param)


def _stop(body: GenerationRequest) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _logit_bias(body: GenerationRequest, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = {}
    for key, bias in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and int(key) < vocab_size):
            raise BadRequest(
                f"'logit_bias' has a key that is no token id in 0..{vocab_size - 1} (got {shown(key)})",
                param="logit_bias",
            )
        biases[int(key)] = bias
    return tuple(biases.items())


def _logprobs(body: GenerationRequest) -> int | None:
    """How many alternatives beside each sampled token; chat spells it with two fields."""
    if isinstance(body, CompletionRequest):
        return body.logprobs
    assert isinstance(body, ChatRequest)
    if not body.logprobs:
        if body.top_logprobs is not None:
            raise BadRequest(
                f"'top_logprobs' needs 'logprobs' true (got {body.top_logprobs})",
                param="top_logprobs",
            )
        return None
    return body.top_logprobs or 0


def _prompt_logprobs(body: GenerationRequest) -> int | None:
    """An echo with logprobs scores the prompt as well; the wider of two wishes is computed."""
    wishes = [body.prompt_logprobs]
    if isinstance(body, CompletionRequest) and body.echo:
        wishes.append(body.logprobs)
    return max((wish for wish in wishes if wish is not None), default=None)
