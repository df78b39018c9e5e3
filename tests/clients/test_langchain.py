"""`langchain-openai` as it is: chat, streams, batches, tools and structured answers."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

MakeChat = Callable[..., ChatOpenAI]

QUESTION = "How are you today?"


class Count(BaseModel):
    """How many of what."""

    number: int = Field(ge=0, le=99)
    fruit: Literal["apples", "pears"]


def add(first: int = Field(ge=0, le=9), second: int = Field(ge=0, le=9)) -> int:
    """Add two numbers."""
    return first + second


@pytest.fixture
def make_chat(base_url: str) -> MakeChat:
    def make(model: str = "pirate@full", **more: Any) -> ChatOpenAI:
        given: dict[str, Any] = {"temperature": 0, "max_tokens": 24} | more
        return ChatOpenAI(base_url=base_url, model=model, max_retries=0, **given)

    return make


def test_a_chat_and_its_stream_say_the_same(make_chat: MakeChat) -> None:
    chat = make_chat()
    answer = chat.invoke([SystemMessage("You are a pirate."), HumanMessage(QUESTION)])
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    whole = None
    parts = 0
    for chunk in make_chat(stream_usage=True).stream(
        [SystemMessage("You are a pirate."), HumanMessage(QUESTION)]
    ):
        whole = chunk if whole is None else whole + chunk
        parts += 1
    assert whole is not None
    assert whole.content == answer.content
    assert whole.usage_metadata is not None
    for count in ("input_tokens", "output_tokens"):
        assert whole.usage_metadata[count] == answer.usage_metadata[count]
    assert parts > 3


def test_the_models_name_and_the_field_choose_the_depth(make_chat: MakeChat) -> None:
    def text(chat: ChatOpenAI) -> object:
        return chat.invoke(QUESTION).content

    assert text(make_chat("pirate@0")) == text(make_chat("fathom-demo"))
    assert text(make_chat("pirate@0")) != text(make_chat("pirate@full"))
    by_field = make_chat("pirate", extra_body={"lora_depth": 0})
    assert text(by_field) == text(make_chat("pirate@0"))


@pytest.mark.anyio
async def test_chains_batches_and_events(make_chat: MakeChat) -> None:
    chain = (
        ChatPromptTemplate.from_messages([("user", "{word}!")]) | make_chat() | StrOutputParser()
    )
    words = [{"word": word} for word in ("Hello", "Goodbye", "Thanks")]
    single = [chain.invoke(word) for word in words]
    assert await chain.abatch(words) == single
    streamed = "".join([part async for part in chain.astream(words[0])])
    assert streamed == single[0]


def test_a_tool_that_must_be_called_is(make_chat: MakeChat) -> None:
    for choice in ("add", "any"):
        chat = make_chat(max_tokens=60).bind_tools([add], tool_choice=choice, strict=True)
        answer = chat.invoke("add 1 and 2")
        assert isinstance(answer, AIMessage)
        call = answer.tool_calls[0]
        assert (call["name"], call["args"].keys()) == ("add", {"first", "second"})
        whole = None
        for chunk in chat.stream("add 1 and 2"):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        assert whole.tool_calls[0]["args"] == call["args"]


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_an_answer_has_the_shape_that_was_asked_for(make_chat: MakeChat, method: Any) -> None:
    """A model this small may fill the space that JSON allows between its parts: some 32 each."""
    chat = make_chat("arithmetic", max_tokens=400)
    answer = chat.with_structured_output(Count, method=method, strict=True).invoke(
        "How many apples?"
    )
    assert isinstance(answer, Count)


def test_completions_and_their_stream_say_the_same(base_url: str) -> None:
    complete = OpenAI(base_url=base_url, model="pirate@4", temperature=0, max_tokens=16)
    assert "".join(complete.stream("Hello")) == complete.invoke("Hello") != ""


def test_log_probabilities_and_sampling_options_are_taken(make_chat: MakeChat) -> None:
    options: dict[str, Any] = {"top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    chat = make_chat(logprobs=True, top_logprobs=2, seed=1, stop=["\n"], temperature=1, **options)
    answers = [chat.invoke(QUESTION) for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert len(answers[0].response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
