"""Messages and tools -> the prompt's text, by the tokenizer's own chat template."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from server.api.messages import Message
from server.errors import BadRequest


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt; what the template refuses (a role, an order of roles) is the client's error."""
    if tokenizer.chat_template is None:
        raise BadRequest(
            "this model's tokenizer has no chat template; send the prompt as text to "
            "/v1/completions",
            param="messages",
            code="no_chat_template",
        )
    conversation = [message.for_template(i) for i, message in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            tools=[*tools] if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (
        *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
        *(ArithmeticError, RecursionError),  # the sandbox's, for a range or a nesting too large
    ) as error:
        raise BadRequest(
            f"the chat template refuses these messages: {error}", param="messages"
        ) from None
    assert isinstance(text, str)
    return text
