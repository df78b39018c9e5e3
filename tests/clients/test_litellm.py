"""LiteLLM as it is, by its provider `openai/`: chat, streams, completions, its router and its errors."""

from typing import Any

import litellm
import pytest
from litellm import Router

from tests.clients.conftest import API_KEY

MESSAGES = [{"role": "user", "content": "How are you today?"}]


@pytest.fixture
def given(base_url: str) -> dict[str, Any]:
    return {"api_base": base_url, "api_key": API_KEY, "max_tokens": 24, "temperature": 0}


def chat(model: str, given: dict[str, Any], **more: Any) -> Any:
    return litellm.completion(model=f"openai/{model}", messages=MESSAGES, **given, **more)


def test_a_chat_and_its_stream_say_the_same(given: dict[str, Any]) -> None:
    answer = chat("pirate@full", given)
    text = answer.choices[0].message.content
    assert text
    chunks = list(chat("pirate@full", given, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == text
    assert len(parts) > 3
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    built = litellm.stream_chunk_builder(chunks)
    assert built is not None
    assert built.choices[0].message.content == text


def test_the_depth_is_chosen_and_told(given: dict[str, Any]) -> None:
    by_name = chat("pirate@4", given)
    by_field = chat("pirate", given, lora_depth=4)
    by_body = chat("pirate", given, extra_body={"lora_depth": 4})
    texts = {answer.choices[0].message.content for answer in (by_name, by_field, by_body)}
    assert len(texts) == 1
    for answer in (by_name, by_field, by_body):
        assert (answer.lora["adapter"], answer.lora["depth"]) == ("pirate", 4)
    assert chat("pirate", given, lora_depth=0).choices[0].message.content not in texts


@pytest.mark.anyio
async def test_it_is_asked_asynchronously(given: dict[str, Any]) -> None:
    expected = chat("pirate@full", given).choices[0].message.content
    stream = await litellm.acompletion(
        model="openai/pirate@full", messages=MESSAGES, stream=True, **given
    )
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(parts) == expected


def test_text_completions(given: dict[str, Any]) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/pirate@4", prompt="Hello", **given
    )
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 24


def test_a_required_tool_is_called(given: dict[str, Any]) -> None:
    number = {"type": "integer", "minimum": 0, "maximum": 9}
    parameters = {
        "type": "object",
        "properties": {"first": number, "second": number},
        "required": ["first", "second"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    choice = {"type": "function", "function": {"name": "add"}}
    answer = chat("pirate@full", given, tools=[tool], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "add"
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_router_of_depths(given: dict[str, Any]) -> None:
    """Two names of one's own for two depths of one adapter."""
    router = Router(
        model_list=[
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/pirate@{depth}"} | given,
            }
            for name, depth in (("brief", 0), ("whole", "full"))
        ]
    )
    texts = {
        name: router.completion(model=name, messages=MESSAGES).choices[0].message.content
        for name in ("brief", "whole")
    }
    assert texts["whole"] == chat("pirate@full", given).choices[0].message.content
    assert texts["brief"] == chat("pirate@0", given).choices[0].message.content


def test_errors_are_told_by_their_kind(given: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError):
        chat("nobody", given)
    with pytest.raises(litellm.BadRequestError, match="from 0 to 12"):
        chat("pirate@99", given)
    with pytest.raises(litellm.AuthenticationError):
        chat("pirate", given | {"api_key": "another"})
