"""`/v1/chat/completions` through the official client: templates, replies, reasoning."""

import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError

from server.config import Settings
from tests.api.conftest import MakeClient
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer

pytestmark = pytest.mark.anyio

HI: list[Any] = [{"role": "user", "content": "hi"}]


def prompt_of(engine: FakeEngine) -> str:
    text = engine.tokenizer.decode(engine.requests[-1].prompt_token_ids)
    assert isinstance(text, str)
    return text


@pytest.fixture
def reader() -> FakeEngine:
    """An engine whose tokenizer can tell reasoning and tool calls from content."""
    return FakeEngine(byte_tokenizer(responses=True))


@pytest.fixture
def reading(make_client: MakeClient, reader: FakeEngine, settings: Settings) -> AsyncOpenAI:
    return AsyncOpenAI(
        api_key="none", base_url="http://fathom/v1", http_client=make_client(reader, settings)
    )


async def test_a_conversation_is_rendered_and_answered(
    openai: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.reply = lambda request, index: "Good day."
    reply = await openai.chat.completions.create(
        model="base",
        messages=[
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
    )
    assert prompt_of(engine) == "system: Be brief.\nuser: a\nb\n<|assistant|>"
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Good day.")
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")


async def test_a_reply_can_be_sent_back(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    reply = await openai.chat.completions.create(model="base", messages=HI, max_tokens=3)
    sent_back: Any = reply.choices[0].message.model_dump()
    await openai.chat.completions.create(
        model="base", messages=[*HI, sent_back, {"role": "user", "content": "on"}]
    )
    assert prompt_of(engine) == "user: hi\nassistant: use\nuser: on\n<|assistant|>"


async def test_a_past_call_and_its_result_reach_the_template(
    openai: AsyncOpenAI, engine: FakeEngine
) -> None:
    await openai.chat.completions.create(
        model="base",
        messages=[
            *HI,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "look", "arguments": '{"at": "sky"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "blue"},
        ],
    )
    assert prompt_of(engine) == (
        'user: hi\nassistant: [look({"at": "sky"})]\ntool: blue\n<|assistant|>'
    )


async def test_the_default_length_is_the_rest_of_the_context(
    openai: AsyncOpenAI, engine: FakeEngine
) -> None:
    await openai.chat.completions.create(model="base", messages=HI)
    (request,) = engine.requests
    assert request.sampling.max_tokens == 512 - len(request.prompt_token_ids)


async def test_both_names_of_the_length(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    await openai.chat.completions.create(model="base", messages=HI, max_tokens=5)
    await openai.chat.completions.create(model="base", messages=HI, max_completion_tokens=6)
    assert [request.sampling.max_tokens for request in engine.requests] == [5, 6]


async def test_special_tokens_are_the_template_s_business(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for wish in (None, False, True):
        body = {"model": "base", "messages": HI, "max_tokens": 1, "add_special_tokens": wish}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    lengths = {len(request.prompt_token_ids) for request in engine.requests}
    assert len(lengths) == 1, "this tokenizer adds none"


async def test_a_stream_gives_role_text_and_reason(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.reply = lambda request, index: f"né{index}"
    texts, roles, reasons = ["", ""], [None, None], [None, None]
    usage = None
    async for chunk in await openai.chat.completions.create(
        model="tuned", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = choice.delta.role or roles[choice.index]
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.finish_reason:
                assert chunk.lora["depth"] == 7
    assert texts == ["né0", "né1"]
    assert roles == ["assistant", "assistant"]
    assert reasons == ["stop", "stop"]
    assert usage is not None
    assert usage.completion_tokens == 8


async def test_a_tokenizer_without_a_template_is_a_400_that_says_so(
    make_client: MakeClient, settings: Settings
) -> None:
    client = make_client(FakeEngine(byte_tokenizer(chat=False)), settings)
    response = await client.post("/v1/chat/completions", json={"model": "base", "messages": HI})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"
    assert "/v1/completions" in response.json()["error"]["message"]


async def test_the_official_client_raises_its_own_error(openai: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match="temperature") as caught:
        await openai.chat.completions.create(model="base", messages=HI, temperature=-1)
    assert caught.value.param == "temperature"


async def test_reasoning_is_told_from_content(reading: AsyncOpenAI, reader: FakeEngine) -> None:
    reader.reply = lambda request, index: "<think>hm, 2</think>Two.<|end|>"
    whole = await reading.chat.completions.create(model="base", messages=HI)
    message: Any = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Two.", "hm, 2")
    assert reader.requests[0].sampling.skip_special_tokens is False, "the parser looks for them"
    content = reasoning = ""
    async for chunk in await reading.chat.completions.create(
        model="base", messages=HI, stream=True
    ):
        delta: Any = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
    assert (content, reasoning) == ("Two.", "hm, 2")


async def test_a_constrained_reply_is_not_parsed(reading: AsyncOpenAI, reader: FakeEngine) -> None:
    reader.reply = lambda request, index: '{"a": "<think>"}'
    reply = await reading.chat.completions.create(
        model="base", messages=HI, response_format={"type": "json_object"}
    )
    assert json.loads(reply.choices[0].message.content or "") == {"a": "<think>"}
