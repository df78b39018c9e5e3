"""Structured output and tools hold on a random model, in every way of asking and side by side."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.live.asking import Answer, Ask, ask_async
from tests.live.process import BASE

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "gréen"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "size"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {field: {"enum": values}},
                "required": [field],
                "additionalProperties": False,
            },
        },
    }
    for name, field, values in (("look", "at", ["sky", "sea"]), ("wait", "seconds", [1, 20]))
]
HI = [{"role": "user", "content": "hi"}]

Check = Callable[[str], bool]


def _fits_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        value.keys() == {"colour", "size"}
        and value["colour"] in ("red", "gréen")
        and type(value["size"]) is int
        and 0 <= value["size"] <= 99
    )


def _matches(pattern: str) -> Check:
    return lambda text: re.fullmatch(pattern, text) is not None


CONSTRAINTS: dict[str, tuple[dict[str, Any], Check]] = {
    "regex": (
        {"structured_outputs": {"regex": "[a-f]{3}-[é😀]{2}[0-9]"}},
        _matches("[a-f]{3}-[é😀]{2}[0-9]"),
    ),
    "lark": (
        {"structured_outputs": {"grammar": 'start: ("yes" | "no") /[0-9]{2}/'}},
        _matches("(yes|no)[0-9]{2}"),
    ),
    "gbnf": (
        {"structured_outputs": {"grammar": 'root ::= ("a" | "b") [0-9] "."'}},
        _matches(r"[ab][0-9]\."),
    ),
    "json": ({"structured_outputs": {"json": SCHEMA}}, _fits_schema),
    "json text": ({"structured_outputs": {"json": json.dumps(SCHEMA | COMPACT)}}, _fits_schema),
    "choice": (
        {"structured_outputs": {"choice": ["left", "right", "über"]}},
        _matches("left|right|über"),
    ),
    "json_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": SCHEMA | COMPACT, "strict": True},
            }
        },
        _fits_schema,
    ),
    "json_object": (
        # Nothing but the bias ends the objects of a model that means nothing.
        {"response_format": {"type": "json_object"}, "logit_bias": {str(ord("}")): 100}},
        lambda text: isinstance(json.loads(text), dict),
    ),
}
"""Fields of the body, and what every text then is."""


def for_chat(fields: dict[str, Any]) -> dict[str, Any]:
    """As the official client takes them: the fields that are OpenAI's own are its arguments."""
    ours = {name: value for name, value in fields.items() if name == "structured_outputs"}
    return {name: fields[name] for name in fields.keys() - ours.keys()} | {"extra_body": ours}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_holds_for_every_choice(ask: Ask, name: str) -> None:
    constraint, holds = CONSTRAINTS[name]
    wish: dict[str, Any] = {"model": "plain@2", "max_tokens": 350, "temperature": 1.5, "seed": 2}
    for answer in (
        ask.complete(prompt="hi", n=2, **wish, extra_body=constraint),
        ask.chat(messages=HI, n=2, **wish, **for_chat(constraint)),
    ):
        assert [told.finish_reason for told in answer.choices] == ["stop", "stop"]
        assert all(holds(text) for text in answer.texts), answer.texts


def test_text_is_no_constraint(ask: Ask) -> None:
    wish: dict[str, Any] = {"model": BASE, "temperature": 0, "max_tokens": 6, "messages": HI}
    assert ask.chat(**wish, response_format={"type": "text"}).text == ask.chat(**wish).text


def test_constraints_of_many_adapters_hold_side_by_side(
    async_client: AsyncOpenAI, runner: asyncio.Runner
) -> None:
    models = (BASE, "plain@1", "plain@full", "head", "dora@2")
    free: dict[str, Any] = {"seed": 4, "max_tokens": 20}
    wishes: list[tuple[str, dict[str, Any], Check]] = [
        ("completions", free | {"model": model, "prompt": "hi", "stream": model == BASE}, bool)
        for model in models
    ]
    for place, (constraint, holds) in enumerate(CONSTRAINTS.values()):
        wish: dict[str, Any] = {
            "model": models[place % len(models)],
            "prompt": f"{place}: hi",
            "n": 1 + place % 2,
            "stream": place % 3 == 0,
            "seed": place,
            "max_tokens": 350,
            "temperature": 1.5,
            "extra_body": constraint,
        }
        wishes.append(("completions", wish, holds))

    async def together() -> list[Answer]:
        return await asyncio.gather(
            *(ask_async(async_client, kind, wish) for kind, wish, _ in wishes)
        )

    async def one_by_one() -> list[Answer]:
        return [await ask_async(async_client, kind, wish) for kind, wish, _ in wishes]

    answers = runner.run(together())
    for answer, (_, wish, holds) in zip(answers, wishes, strict=True):
        assert all(holds(text) for text in answer.texts), (wish, answer.texts)
    alone = runner.run(one_by_one())
    assert [answer.texts for answer in answers] == [answer.texts for answer in alone]


def test_a_named_tool_is_called(ask: Ask) -> None:
    choice = {"type": "function", "function": {"name": "wait"}}
    answer = ask.chat(
        model="head@2", messages=HI, tools=TOOLS, tool_choice=choice, n=2, max_tokens=60, seed=1
    )
    for told in answer.choices:
        ((name, arguments),) = told.calls
        assert name == "wait"
        assert json.loads(arguments)["seconds"] in (1, 20)
        assert (told.text, told.finish_reason) == ("", "tool_calls")


def test_required_calls_some_tool_and_one_where_parallel_calls_are_refused(ask: Ask) -> None:
    wish: dict[str, Any] = {"model": "plain@3", "messages": HI, "tools": TOOLS, "seed": 3}
    wish |= {"tool_choice": "required", "max_tokens": 120}
    answer = ask.chat(**wish, n=2, parallel_tool_calls=False)
    for told in answer.choices:
        ((name, arguments),) = told.calls
        values = {"look": ("sky", "sea"), "wait": (1, 20)}[name]
        (value,) = json.loads(arguments).values()
        assert value in values
        assert (told.text, told.finish_reason) == ("", "tool_calls")
    # A comma instead of the end, for as long as there is room.
    (told,) = ask.chat(**wish, logit_bias={str(ord("]")): -100}).choices
    assert len(told.calls) > 1
    assert told.finish_reason == "length"


def test_none_hides_the_tools_from_the_model(ask: Ask) -> None:
    wish: dict[str, Any] = {"model": BASE, "messages": HI, "max_tokens": 8, "temperature": 0}
    answer = ask.chat(**wish, tools=TOOLS, tool_choice="none")
    (told,) = answer.choices
    assert told.calls == []
    assert told.text == ask.chat(**wish).text
    assert answer.usage is not None
    usage = ask.chat(**wish, tools=TOOLS, tool_choice="required").usage
    assert usage is not None
    assert usage.prompt_tokens > answer.usage.prompt_tokens
