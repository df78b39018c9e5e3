"""Chat messages on the wire, and the plain dictionaries that a chat template takes.

Roles are the template's business: one that it does not know is its error, which becomes a 400.
Text parts of a list are joined by newlines, and a tool call's `arguments` become an object, because
templates are written for that; both as vLLM does.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from server.api.json_text import json_text
from server.api.strict import StrictModel
from server.errors import BadRequest


class TextPart(StrictModel):
    """One text part of a message; images, audio and files are not understood."""

    unsupported: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("image_url", "video_url", "input_audio", "file"), "messages are text only"
    )

    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    """Which function an assistant message called, with its arguments as a JSON text."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str


class MessageToolCall(StrictModel):
    """One call that an earlier assistant message made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def _content_kind(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("parts")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class Message(StrictModel):
    """One message of a conversation, as a client writes it or sends back what it was given."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "refusal": "this server writes none",
        "audio": "messages are text only",
        "function_call": "use `tool_calls`",
        "annotations": "this server writes none",
    }

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def for_template(self, position: int) -> dict[str, Any]:
        """What a chat template reads; fields that were not given are left out."""
        if self.content is None and not self.tool_calls:
            raise BadRequest(
                f"'messages[{position}].content' is required in a message without tool calls",
                param=f"messages[{position}].content",
            )
        message: dict[str, Any] = {"role": self.role, "content": self._text()}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(
                            call, f"messages[{position}].tool_calls[{i}].function.arguments"
                        ),
                    },
                }
                for i, call in enumerate(self.tool_calls)
            ]
        return message

    def _text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


def _arguments(call: MessageToolCall, param: str) -> dict[str, Any]:
    try:
        arguments = json_text(call.function.arguments or "{}")
    except BadRequest as error:
        raise BadRequest(f"'{param}' {error.message}", param=param) from None
    if not isinstance(arguments, dict):
        raise BadRequest(f"'{param}' must hold a JSON object", param=param)
    return arguments
