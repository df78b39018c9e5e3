"""Tools on the wire: which a template sees, whether a call is forced, and by which grammar.

`auto` leaves the choice to the model, so its words must be told from its calls: that needs the
tokenizer's response template. `required` and a named tool are forced by a grammar, on any
tokenizer, and the reply is then JSON of a shape this file knows.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.api.strict import StrictModel
from server.api.structured import Constraint, JsonSchema, json_grammar
from server.errors import BadRequest

_COMPACT: JsonSchema = {"x-guidance": {"whitespace_flexible": False}}
"""A forced call has no reader for whom to indent it, and a weak model may never stop indenting."""

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(StrictModel):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> JsonSchema:
        """The JSON schema of its arguments; without one, any object."""
        return self.parameters or {"type": "object"}


class Tool(StrictModel):
    """One tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    """The name of a tool to call."""

    name: ToolName


class NamedTool(StrictModel):
    """A `tool_choice` that names a tool."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedTool, Tag("name")],
    Discriminator(lambda value: "name" if isinstance(value, dict) else "word"),
]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's tools come to."""

    mode: Literal["none", "auto", "required", "named"]
    tools: tuple[Tool, ...] = ()
    name: str | None = None
    """The tool that `named` forces."""
    max_calls: int | None = None
    """1 where the client refuses parallel calls."""

    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools as a chat template takes them; none where the model may not call any."""
        if self.mode == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def constraint(self) -> Constraint | None:
        """The grammar of a forced call."""
        if self.mode == "named":
            function = next(t.function for t in self.tools if t.function.name == self.name)
            return json_grammar(function.schema_of_arguments | _COMPACT, "tools")
        if self.mode == "required":
            return json_grammar(self._schema_of_calls() | _COMPACT, "tools")
        return None

    def _schema_of_calls(self) -> JsonSchema:
        """`[{"name": ..., "parameters": {...}}, ...]`, with each tool's `$defs` at the root."""
        definitions: JsonSchema = {}
        calls = []
        for function in (tool.function for tool in self.tools):
            arguments = dict(function.schema_of_arguments)
            for name, definition in arguments.pop("$defs", {}).items():
                if definitions.setdefault(name, definition) != definition:
                    raise BadRequest(
                        f"'tools' define '$defs.{name}' in two ways; name them apart", param="tools"
                    )
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function.name}, "parameters": arguments},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        schema: JsonSchema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        if self.max_calls is not None:
            schema["maxItems"] = self.max_calls
        if definitions:
            schema["$defs"] = definitions
        return schema


def tool_use(
    tools: list[Tool] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool | None,
    *,
    can_parse: bool,
) -> ToolUse:
    """Settle `tools`, `tool_choice` and `parallel_tool_calls` against what the tokenizer can do."""
    if not tools:
        if choice not in (None, "none"):
            raise BadRequest("'tool_choice' needs 'tools', and none are given", param="tool_choice")
        if parallel is not None:
            raise BadRequest(
                "'parallel_tool_calls' needs 'tools', and none are given",
                param="parallel_tool_calls",
            )
        return ToolUse("none")
    names = [tool.function.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadRequest(f"tool '{twice}' is given more than once", param="tools")
    max_calls = 1 if parallel is False else None
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise BadRequest(
                f"'tool_choice' names '{name}', which is not in 'tools' ({', '.join(names)})",
                param="tool_choice",
            )
        return ToolUse("named", tuple(tools), name, 1)
    mode = choice or "auto"
    if mode == "auto" and not can_parse:
        raise BadRequest(
            "tool_choice 'auto' (the default with tools) cannot be served: this model's tokenizer "
            "has no response template by which a tool call is told from text; use 'required', a "
            "named tool, or 'none'",
            param="tool_choice",
        )
    return ToolUse(mode, tuple(tools), None, max_calls)
