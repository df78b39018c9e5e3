"""Tools: parsed where the tokenizer can, forced by a grammar where the client asks, refused otherwise."""

import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from server.api.assistant import RequiredCallsParser, TemplateParser
from server.api.tools import ToolUse
from server.config import Settings
from tests.api.conftest import MakeClient
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer

pytestmark = pytest.mark.anyio

HI: list[Any] = [{"role": "user", "content": "hi"}]
LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a thing.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string"}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
WAIT: Any = {
    "type": "function",
    "function": {
        "name": "wait",
        "parameters": {
            "type": "object",
            "properties": {"s": {"$ref": "#/$defs/seconds"}},
            "$defs": {"seconds": {"type": "integer"}},
            "required": ["s"],
        },
    },
}
TWO_CALLS = (
    'I look.<call>{"name": "look", "arguments": {"at": "sky é"}}</call>'
    '<call>{"name": "wait", "arguments": {"s": 3}}</call><|end|>'
)


@pytest.fixture
def reader() -> FakeEngine:
    return FakeEngine(byte_tokenizer(responses=True), max_model_len=4096)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(byte_tokenizer(), max_model_len=4096)


@pytest.fixture
def reading(make_client: MakeClient, reader: FakeEngine, settings: Settings) -> AsyncOpenAI:
    return AsyncOpenAI(
        api_key="none", base_url="http://fathom/v1", http_client=make_client(reader, settings)
    )


async def ask(client: AsyncOpenAI, *, stream: bool, **wish: Any) -> tuple[str, list[Any], str]:
    """Content, calls as `(name, arguments)` and the finish reason, streamed or not."""
    wish = {"model": "base", "messages": HI, "tools": [LOOK, WAIT]} | wish
    if not stream:
        reply = await client.chat.completions.create(**wish)
        message = reply.choices[0].message
        calls = [
            (call.function.name, json.loads(call.function.arguments))
            for call in message.tool_calls or []
        ]
        assert len({call.id for call in message.tool_calls or []}) == len(calls)
        return message.content or "", calls, reply.choices[0].finish_reason
    content, names, arguments, reason = "", {}, {}, ""
    async for chunk in await client.chat.completions.create(**wish, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            if call.id:
                names[call.index] = call.function.name
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    calls = [(names[i], json.loads(arguments[i])) for i in sorted(names)]
    return content, calls, reason


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_told_from_content(
    reading: AsyncOpenAI, reader: FakeEngine, stream: bool
) -> None:
    reader.reply = lambda request, index: TWO_CALLS
    assert await ask(reading, stream=stream) == (
        "I look.",
        [("look", {"at": "sky é"}), ("wait", {"s": 3})],
        "tool_calls",
    )
    prompt = reader.tokenizer.decode(reader.requests[0].prompt_token_ids)
    assert prompt.startswith('TOOLS [{"type": "function", "function": {"name": "look"')


@pytest.mark.parametrize("stream", [False, True])
async def test_parallel_calls_can_be_refused(
    reading: AsyncOpenAI, reader: FakeEngine, stream: bool
) -> None:
    reader.reply = lambda request, index: TWO_CALLS
    _, calls, _ = await ask(reading, stream=stream, parallel_tool_calls=False)
    assert calls == [("look", {"at": "sky é"})]


@pytest.mark.parametrize("stream", [False, True])
async def test_none_hides_the_tools_and_leaves_a_call_as_text(
    reading: AsyncOpenAI, reader: FakeEngine, stream: bool
) -> None:
    reader.reply = lambda request, index: 'A<call>{"name": "look", "arguments": {}}</call>B<|end|>'
    content, calls, reason = await ask(reading, stream=stream, tool_choice="none")
    assert (calls, reason) == ([], "stop")
    assert content.startswith('A<call>{"name": "look", "arguments": {}}')
    assert content.endswith("B")
    assert "TOOLS" not in reader.tokenizer.decode(reader.requests[0].prompt_token_ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", ['{"name": "look", "argu', '{"name": "look"}', "[1"])
async def test_a_broken_call_is_handed_on_as_content(
    reading: AsyncOpenAI, reader: FakeEngine, stream: bool, broken: str
) -> None:
    reader.reply = lambda request, index: f"Well.<call>{broken}</call>More."
    content, calls, _ = await ask(reading, stream=stream)
    assert calls == []
    assert content.startswith("Well.")
    assert broken in content
    assert content.endswith("More.")


def test_a_template_parser_loses_nothing_however_its_text_is_cut() -> None:
    tokenizer = byte_tokenizer(responses=True)
    text = '<think>a</think>B<call>{"name": "f", "arguments": {"x": 1}}</call>C<call>{"bad'
    for size in (1, 2, 3, 5, 8, 13, 100):
        parser = TemplateParser(tokenizer, "<|assistant|>", ToolUse("auto"))
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        deltas = [*(parser.feed(piece) for piece in pieces), parser.finish()]
        content = "".join(delta.content for delta in deltas)
        assert content.startswith("BC"), size
        assert '{"bad' in content, size
        assert "".join(delta.reasoning for delta in deltas) == "a"
        assert [call.arguments for delta in deltas for call in delta.calls] == ['{"x": 1}']


@pytest.mark.parametrize("stream", [False, True])
async def test_a_named_tool_is_forced_on_any_tokenizer(
    openai: AsyncOpenAI, engine: FakeEngine, stream: bool
) -> None:
    engine.reply = lambda request, index: '{"at":"sky"}'
    choice = {"type": "function", "function": {"name": "look"}}
    assert await ask(openai, stream=stream, tool_choice=choice) == (
        "",
        [("look", {"at": "sky"})],
        "tool_calls",
    )
    assert engine.allows('{"at":"sky"}')
    assert not engine.allows('{"s":3}')
    assert not engine.allows("I would rather talk.")


@pytest.mark.parametrize("stream", [False, True])
async def test_required_forces_some_call_on_any_tokenizer(
    openai: AsyncOpenAI, engine: FakeEngine, stream: bool
) -> None:
    text = '[{"name":"wait","parameters":{"s":3}},{"name":"look","parameters":{"at":"a}\\"{é"}}]'
    engine.reply = lambda request, index: text
    assert await ask(openai, stream=stream, tool_choice="required") == (
        "",
        [("wait", {"s": 3}), ("look", {"at": 'a}"{é'})],
        "tool_calls",
    )
    assert engine.allows(text)
    assert not engine.allows('[{"name":"look","parameters":{"s":3}}]')
    assert not engine.allows('[{"name":"wait","parameters":{"s":"three"}}]')
    assert not engine.allows("[]")
    await ask(openai, stream=stream, tool_choice="required", parallel_tool_calls=False)
    assert not engine.allows(text)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_call_cut_by_length_says_length(
    openai: AsyncOpenAI, engine: FakeEngine, stream: bool
) -> None:
    text = '[{"name":"wait","parameters":{"s":3}},{"name":"lo'
    engine.reply = lambda request, index: text
    content, calls, reason = await ask(
        openai, stream=stream, tool_choice="required", max_tokens=len(text)
    )
    assert calls == [("wait", {"s": 3})]
    assert (content, reason) == (',{"name":"lo', "length")


def test_required_calls_are_read_however_their_text_is_cut() -> None:
    text = '[{"name":"a","parameters":{"x":{"y":"}"}}}, {"name":"b","parameters":{}}]'
    for size in (1, 2, 3, 7, 100):
        parser = RequiredCallsParser()
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        deltas = [*(parser.feed(piece) for piece in pieces), parser.finish()]
        calls = [(call.name, call.arguments) for delta in deltas for call in delta.calls]
        assert calls == [("a", '{"x": {"y": "}"}}'), ("b", "{}")], size
        assert "".join(delta.content for delta in deltas) == ""


async def test_definitions_that_clash_are_refused(openai: AsyncOpenAI) -> None:
    other = json.loads(
        json.dumps(WAIT).replace('"wait"', '"rest"').replace('"integer"', '"number"')
    )
    with pytest.raises(Exception, match=r"\$defs\.seconds"):
        await ask(openai, stream=False, tools=[WAIT, other], tool_choice="required")
