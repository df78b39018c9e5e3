"""`response_format` and `structured_outputs` on the wire -> one llguidance grammar.

The grammar is compiled once by the engine before the request is queued, so that a bad one is a 400
in the compiler's own words.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from llguidance import LLMatcher, grammar_from
from pydantic import Field

from server.api.json_text import json_text
from server.api.strict import StrictModel
from server.engine.protocol import Engine
from server.errors import BadRequest

MAX_GRAMMAR_CHARS = 64 << 10
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Room to indent between two tokens of JSON, and an end to it: with no bound a weak model can write
nothing but spaces until its length is up. `x-guidance` in a client's schema says otherwise."""
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)

JsonSchema = dict[str, Any]


class NamedSchema(StrictModel):
    """OpenAI's wrapping of a JSON schema; `strict` is what happens anyway."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`: exactly one kind of constraint."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "json_object": "use `response_format`",
        "structural_tag": "use `grammar`",
        "whitespace_pattern": "use `x-guidance` inside the schema",
        "disable_any_whitespace": "use `x-guidance` inside the schema",
        "disable_fallback": "there is one backend",
        "disable_additional_properties": "write it into the schema",
    }

    json_: Annotated[JsonSchema | str | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None


Constraint = tuple[str, str]
"""The field that asked for it and the llguidance grammar."""


def constraint(
    response_format: ResponseFormat | None, outputs: StructuredOutputs | None
) -> Constraint | None:
    """The one constraint that a request states, None where it states none."""
    by_format = _of_response_format(response_format) if response_format else None
    by_outputs = _of_structured_outputs(outputs) if outputs else None
    if by_format and by_outputs:
        raise BadRequest(
            "'structured_outputs' and 'response_format' both constrain the output: give one",
            param="structured_outputs",
        )
    return by_format or by_outputs


def json_grammar(schema: JsonSchema | str, param: str) -> Constraint:
    """A grammar of the JSON texts that satisfy a schema."""
    if isinstance(schema, str):
        _check_size(schema, param)
        try:
            schema = json_text(schema)
        except BadRequest as error:
            raise BadRequest(f"'{param}' is no JSON schema: {error.message}", param=param) from None
        if not isinstance(schema, dict):
            raise BadRequest(f"'{param}' is no JSON schema: it must be an object", param=param)
    text = json.dumps({"x-guidance": {"whitespace_pattern": _WHITESPACE}} | schema)
    _check_size(text, param)
    return param, LLMatcher.grammar_from_json_schema(text)


async def compiled(stated: Constraint | None, engine: Engine) -> str | None:
    """The grammar, once the engine has compiled it."""
    if stated is None:
        return None
    param, grammar = stated
    try:
        await engine.check_grammar(grammar)
    except BadRequest as error:
        raise BadRequest(
            f"'{param}' cannot be compiled: {error.message}", param=param, code="invalid_grammar"
        ) from None
    return grammar


def _of_response_format(response_format: ResponseFormat) -> Constraint | None:
    if response_format.type == "json_schema":
        if response_format.json_schema is None:
            raise BadRequest(
                "field 'response_format.json_schema' is required with type 'json_schema'",
                param="response_format.json_schema",
            )
        return json_grammar(
            response_format.json_schema.schema_, "response_format.json_schema.schema"
        )
    if response_format.json_schema is not None:
        raise BadRequest(
            "'response_format.json_schema' needs type 'json_schema' "
            f"(got type '{response_format.type}')",
            param="response_format.json_schema",
        )
    if response_format.type == "json_object":
        return json_grammar({"type": "object"}, "response_format")
    return None


def _of_structured_outputs(outputs: StructuredOutputs) -> Constraint:
    given = [name for name, value in outputs if value is not None]
    if len(given) != 1:
        raise BadRequest(
            "'structured_outputs' takes exactly one of json, regex, grammar, choice "
            f"(got {len(given)})",
            param="structured_outputs",
        )
    if outputs.json_ is not None:
        return json_grammar(outputs.json_, "structured_outputs.json")
    if outputs.regex is not None:
        _check_size(outputs.regex, "structured_outputs.regex")
        return "structured_outputs.regex", LLMatcher.grammar_from_regex(outputs.regex)
    if outputs.grammar is not None:
        _check_size(outputs.grammar, "structured_outputs.grammar")
        return "structured_outputs.grammar", _lark_or_gbnf(outputs.grammar)
    assert outputs.choice is not None
    param = "structured_outputs.choice"
    if "" in outputs.choice:
        raise BadRequest(f"'{param}[{outputs.choice.index('')}]' is empty", param=param)
    lark = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in outputs.choice)
    _check_size(lark, param)
    return param, LLMatcher.grammar_from_lark(lark)


def _lark_or_gbnf(text: str) -> str:
    """Clients of vLLM write either; a rule of GBNF has `::=`.

    Without blank lines, over a run of which the converter takes a time that grows with its square: 15
    seconds for as many as a request may hold.
    """
    text = "\n".join(line for line in text.splitlines() if line.strip())
    if not _GBNF_RULE.search(text):
        return LLMatcher.grammar_from_lark(text)
    try:
        return grammar_from("gbnf", text)
    except ValueError as error:
        param = "structured_outputs.grammar"
        raise BadRequest(f"'{param}' cannot be read: {error}", param=param) from None


def _check_size(text: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise BadRequest(
            f"'{param}' is over the limit of {MAX_GRAMMAR_CHARS} characters (got {len(text)})",
            param=param,
        )
