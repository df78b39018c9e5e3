"""One sequence on its way to being an assistant's message, and its tool calls on the wire."""

from typing import Literal

from openai.types.chat import ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion_chunk import (
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_message_function_tool_call import Function

from server.api.assistant import AssistantParser, CallDelta, MessageDelta
from server.engine.request import SequenceDelta


class Reply:
    """One sequence as a message under way."""

    def __init__(self, parser: AssistantParser) -> None:
        self._parser = parser
        self._has_calls = False

    def read(self, delta: SequenceDelta) -> MessageDelta:
        """What the message gains by a sequence's delta."""
        gained = self._parser.feed(delta.text) if delta.text else MessageDelta()
        if delta.finish_reason is not None:
            gained += self._parser.finish()
        self._has_calls = self._has_calls or bool(gained.calls)
        return gained

    def finish_reason(self, delta: SequenceDelta) -> Literal["stop", "length", "tool_calls"] | None:
        """OpenAI's word for how it ended; a reply that called a tool says so."""
        if delta.finish_reason is None:
            return None
        if delta.finish_reason == "length":
            return "length"
        return "tool_calls" if self._has_calls else "stop"


def whole_calls(deltas: tuple[CallDelta, ...]) -> list[ChatCompletionMessageFunctionToolCall]:
    """The calls of a whole reply."""
    calls: list[ChatCompletionMessageFunctionToolCall] = []
    for delta in deltas:
        if delta.id is not None and delta.name is not None:
            calls.append(
                ChatCompletionMessageFunctionToolCall(
                    id=delta.id,
                    type="function",
                    function=Function(name=delta.name, arguments=delta.arguments),
                )
            )
        else:
            calls[delta.index].function.arguments += delta.arguments
    return calls


def call_delta(call: CallDelta) -> ChoiceDeltaToolCall:
    """What a call gained, for a chunk."""
    if call.id is None:
        return ChoiceDeltaToolCall(
            index=call.index, function=ChoiceDeltaToolCallFunction(arguments=call.arguments)
        )
    return ChoiceDeltaToolCall(
        index=call.index,
        id=call.id,
        type="function",
        function=ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments),
    )
