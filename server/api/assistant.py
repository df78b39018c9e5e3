"""A reply's text, piece by piece -> content, reasoning and tool calls.

Three parsers with one interface: plain text, a tokenizer's response template, and the JSON that a
forced tool call is made of. Streams send each delta and whole replies add them up: both say the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from server.api.tools import ToolUse

_REASONING_FIELDS = frozenset({"reasoning_content", "reasoning", "thinking"})


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What one tool call gained: first its id and name, then its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """What a reply gained."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    def __add__(self, later: "MessageDelta") -> "MessageDelta":
        return MessageDelta(
            self.content + later.content, self.reasoning + later.reasoning, self.calls + later.calls
        )


class AssistantParser(Protocol):
    """Text in, deltas out; `finish` gives what was held back."""

    def feed(self, text: str) -> MessageDelta:
        """The next piece of text."""

    def finish(self) -> MessageDelta:
        """No more text comes."""


class TextParser:
    """Everything is content."""

    def feed(self, text: str) -> MessageDelta:
        """The text itself."""
        return MessageDelta(content=text)

    def finish(self) -> MessageDelta:
        """Nothing is held back."""
        return MessageDelta()


class TemplateParser:
    """Reads a reply by the tokenizer's response template.

    A region that the template cannot read (broken JSON in a tool call) is handed on as content with
    the rest of the text, so that nothing the model wrote is lost.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, use: ToolUse) -> None:
        self._parser = tokenizer.get_response_parser(
            prefix=prompt, tools=[*(use.for_template() or ())]
        )
        self._use = use
        self._num_calls = 0
        self._region = ""
        """Raw text of the open region, where it is told only once it is whole."""
        self._unread = ""
        """Text that the parser holds back, with delimiters that it passed over."""
        self._is_broken = False

    def feed(self, text: str) -> MessageDelta:
        """Deltas of the regions that `text` fills or closes."""
        if self._is_broken:
            return MessageDelta(content=text)
        self._unread += text
        try:
            events = self._parser.feed(text)
        except (ValueError, KeyError, TypeError):  # what its content parsers raise
            return self._give_up()
        return self._read(events)

    def finish(self) -> MessageDelta:
        """Close the last region."""
        if self._is_broken:
            return MessageDelta()
        try:
            _, events = self._parser.finalize()
        except (ValueError, KeyError, TypeError):
            return self._give_up()
        return self._read(events)

    def _read(self, events: list[dict[str, Any]]) -> MessageDelta:
        content, reasoning = "", ""
        calls: list[CallDelta] = []
        for event in events:
            is_call = event["field"] == "tool_calls"
            if event["type"] == "region_chunk":
                piece = self._take(event["text"])
                if is_call or event["dirty"]:
                    self._region += piece
                elif event["field"] in _REASONING_FIELDS:
                    reasoning += event["text"]
                else:
                    content += event["text"]
            elif event["type"] == "region_close":
                found = self._calls(event["value"]) if is_call else None
                if found is None:
                    content += self._region
                else:
                    calls += found
                self._region = ""
        if self._use.max_calls is not None:
            calls = [call for call in calls if call.index < self._use.max_calls]
        return MessageDelta(content, reasoning, tuple(calls))

    def _take(self, text: str) -> str:
        """Move `text`, with the delimiter before it, out of what is unread."""
        start = self._unread.find(text)
        if start < 0:
            return text
        end = start + len(text)
        piece, self._unread = self._unread[:end], self._unread[end:]
        return piece

    def _calls(self, value: Any) -> list[CallDelta] | None:
        """The calls of a region; None where the client wants none, or a part of one is missing."""
        if self._use.mode == "none":
            return None
        try:
            found = [call["function"] for call in (value if isinstance(value, list) else [value])]
            return [self._call(function) for function in found]
        except (KeyError, TypeError):
            return None

    def _call(self, function: Mapping[str, Any]) -> CallDelta:
        name, arguments = function["name"], function["arguments"]
        if not isinstance(name, str):
            raise TypeError("a call without a name")
        call = CallDelta(
            index=self._num_calls,
            arguments=arguments
            if isinstance(arguments, str)
            else json.dumps(arguments, ensure_ascii=False),
            id=_call_id(),
            name=name,
        )
        self._num_calls += 1
        return call

    def _give_up(self) -> MessageDelta:
        self._is_broken = True
        return MessageDelta(content=self._region + self._unread)


class NamedCallParser:
    """The whole reply is the arguments of the one tool that was named."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> MessageDelta:
        """More arguments; the first piece carries the name."""
        if self._name is None:
            return MessageDelta(calls=(CallDelta(0, text),))
        call = CallDelta(0, text, id=_call_id(), name=self._name)
        self._name = None
        return MessageDelta(calls=(call,))

    def finish(self) -> MessageDelta:
        """Nothing is held back."""
        return MessageDelta()


class RequiredCallsParser:
    """The reply is a JSON list of `{"name", "parameters"}`; a call is told once it is whole.

    What a reply cut by its length leaves unfinished becomes content.
    """

    def __init__(self) -> None:
        self._unread = ""
        self._num_calls = 0
        self._decoder = json.JSONDecoder()

    def feed(self, text: str) -> MessageDelta:
        """The calls that `text` completes."""
        self._unread += text
        calls = []
        while "}" in text:
            start = self._unread.lstrip("[, \n")
            try:
                call, end = self._decoder.raw_decode(start)
            except ValueError:
                break
            self._unread = start[end:]
            arguments = json.dumps(call["parameters"], ensure_ascii=False)
            calls.append(CallDelta(self._num_calls, arguments, _call_id(), call["name"]))
            self._num_calls += 1
        return MessageDelta(calls=tuple(calls))

    def finish(self) -> MessageDelta:
        """The unfinished rest."""
        return MessageDelta(content=self._unread.strip("[], \n") and self._unread)


def assistant_parser(
    tokenizer: PreTrainedTokenizerBase, prompt: str, use: ToolUse, *, is_constrained: bool
) -> AssistantParser:
    """The parser for one choice of a request."""
    if use.mode == "named":
        assert use.name is not None
        return NamedCallParser(use.name)
    if use.mode == "required":
        return RequiredCallsParser()
    if reads_replies(tokenizer) and not is_constrained:
        return TemplateParser(tokenizer, prompt, use)
    return TextParser()


def reads_replies(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer says how to tell content, reasoning and tool calls apart."""
    return getattr(tokenizer, "response_template", None) is not None


def _call_id() -> str:
    return f"call_{uuid4().hex[:24]}"
