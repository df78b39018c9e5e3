"""The official client in four ways, sync and async, whole and streamed, with one shape of answer.

A test written once with `Ask` is run in each way, and says the same of all of them.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI, OpenAI
from openai.types import CompletionUsage

WAYS = ("sync", "async", "sync stream", "async stream")


@dataclass(slots=True)
class Told:
    """One choice of an answer."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    """Of each token, beside it in `tokens`."""
    tops: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Name and arguments of each tool call."""


@dataclass(slots=True)
class Answer:
    """A whole answer, however it came."""

    choices: list[Told]
    usage: CompletionUsage | None
    lora: dict[str, Any] | None
    num_chunks: int
    """0 for one that was not streamed."""

    @property
    def text(self) -> str:
        """The text of the only choice."""
        (choice,) = self.choices
        return choice.text

    @property
    def texts(self) -> list[str]:
        """The text of each choice."""
        return [choice.text for choice in self.choices]


class Ask:
    """Asks a server in one way."""

    def __init__(
        self, way: str, client: OpenAI, async_client: AsyncOpenAI, runner: asyncio.Runner
    ) -> None:
        self.way = way
        self.is_stream = way.endswith("stream")
        self._is_async = way.startswith("async")
        self._client = client
        self._async_client = async_client
        self._runner = runner

    def complete(self, **wish: Any) -> Answer:
        """`client.completions.create`."""
        return self._ask("completions", wish)

    def chat(self, **wish: Any) -> Answer:
        """`client.chat.completions.create`."""
        return self._ask("chat.completions", wish)

    def _ask(self, resource: str, wish: dict[str, Any]) -> Answer:
        if self.is_stream:
            wish = {"stream_options": {"include_usage": True}} | wish | {"stream": True}
        if self._is_async:
            return self._runner.run(ask_async(self._async_client, resource, wish))
        create = _resource(self._client, resource).create
        if not self.is_stream:
            return _whole(create(**wish))
        with create(**wish) as stream:
            return _gathered(list(stream))


async def ask_async(client: AsyncOpenAI, resource: str, wish: dict[str, Any]) -> Answer:
    """One question of many that are asked at once."""
    create = _resource(client, resource).create
    if not wish.get("stream"):
        return _whole(await create(**wish))
    async with await create(**wish) as stream:
        return _gathered([chunk async for chunk in stream])


def _resource(client: Any, path: str) -> Any:
    for name in path.split("."):
        client = getattr(client, name)
    return client


def _whole(answer: Any) -> Answer:
    choices = []
    for position, choice in enumerate(answer.choices):
        assert choice.index == position
        told = Told(finish_reason=choice.finish_reason, stop_reason=choice.stop_reason)
        if answer.object == "text_completion":
            told.text = choice.text
        else:
            told.text = choice.message.content or ""
            told.calls = [
                (call.function.name, call.function.arguments)
                for call in choice.message.tool_calls or []
            ]
        _add_logprobs(told, choice)
        choices.append(told)
    return Answer(choices, answer.usage, getattr(answer, "lora", None), num_chunks=0)


def _gathered(chunks: list[Any]) -> Answer:
    by_index: dict[int, Told] = {}
    usage, lora = None, None
    assert len({chunk.id for chunk in chunks}) == 1
    for chunk in chunks:
        lora = getattr(chunk, "lora", None) or lora
        if chunk.usage is not None:
            assert chunk is chunks[-1]
            assert chunk.choices == []
            usage = chunk.usage
        for choice in chunk.choices:
            told = by_index.setdefault(choice.index, Told())
            assert told.finish_reason is None, "a choice goes on after its end"
            if chunk.object == "text_completion":
                told.text += choice.text
            else:
                told.text += choice.delta.content or ""
                _add_calls(told, choice.delta.tool_calls or [])
            _add_logprobs(told, choice)
            told.finish_reason = choice.finish_reason
            told.stop_reason = getattr(choice, "stop_reason", None)
    choices = [by_index[index] for index in sorted(by_index)]
    assert sorted(by_index) == list(range(len(choices)))
    assert all(choice.finish_reason is not None for choice in choices)
    return Answer(choices, usage, lora, num_chunks=len(chunks))


def _add_calls(told: Told, calls: Iterable[Any]) -> None:
    for call in calls:
        if call.id:
            assert call.index == len(told.calls)
            told.calls.append((call.function.name, ""))
        name, arguments = told.calls[call.index]
        told.calls[call.index] = (name, arguments + call.function.arguments)


def _add_logprobs(told: Told, choice: Any) -> None:
    if choice.logprobs is None:
        return
    content = getattr(choice.logprobs, "content", None)
    if content is None:
        told.tokens += choice.logprobs.tokens
        told.logprobs += choice.logprobs.token_logprobs
        told.tops += choice.logprobs.top_logprobs
        told.offsets += choice.logprobs.text_offset
        return
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        told.tokens.append(entry.token)
        told.logprobs.append(entry.logprob)
        told.tops.append({top.token: top.logprob for top in entry.top_logprobs})
