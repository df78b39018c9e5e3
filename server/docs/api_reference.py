"""`api.md`: every route, its key, its body and its answer, from the server's own OpenAPI document."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from server.api.app import create_app
from server.environment import load_settings
from server.loading import load_engine, with_demo

Document = dict[str, Any]
Schema = dict[str, Any]

_OPENING = """\
# API

<!-- Written by `python -m server.docs` from the OpenAPI document. -->

What a server answers, as its `/openapi.json` has it. A key goes into `Authorization: Bearer KEY`; an admin
key opens what an API key does, and without `--admin-key` or an admin key made by `fathom keys add` the
routes that ask for one are off.
A field that is not listed is a 400 that names it. Every error, of every route, is an
[ErrorResponse](#errorresponse). What fields of OpenAI's mean is said in OpenAI's reference, and those of
vLLM's in vLLM's; `lora_depth` is a number of layers, `"auto"` or `"full"`, and [Concepts](concepts.md) says
what that is. The two completion routes answer as OpenAI's do, with a [LoraReport](#lorareport) as `"lora"`.
"""

_GROUPS = (
    ("Completions, models and tokens", ("/v1/", "/tokenize", "/detokenize")),
    ("Health and metrics", ("/health", "/ready", "/version", "/metrics")),
    ("Administration", ("/admin/",)),
)

# Their answers are OpenAI's own types, with fields that are never sent.
_OF_OPENAI = ("/v1/completions", "/v1/chat/completions")

_KEYS = {"api_key": "API", "admin_key": "admin"}


def openapi_document() -> Document:
    """The document of a server that has every route, with the demo loaded."""
    settings = with_demo(load_settings(environ={}))
    engine = load_engine(settings)
    try:
        return create_app(settings, engine).openapi()
    finally:
        engine.shutdown()


def api_reference(document: Document) -> str:
    """The page as Markdown."""
    lines = [_OPENING]
    for title, prefixes in _GROUPS:
        lines += [f"## {title}\n", "| route | key | body | answer | |", "|---|---|---|---|---|"]
        for path, method, operation in _operations(document):
            if path.startswith(prefixes):
                lines.append(_route(path, method, operation))
        lines.append("")
    lines.append("## Types\n")
    schemas = document["components"]["schemas"]
    for name in sorted(_reached(schemas, _roots(document))):
        lines += _type(name, schemas[name])
    return "\n".join(lines)


def _operations(document: Document) -> Iterator[tuple[str, str, Schema]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _route(path: str, method: str, operation: Schema) -> str:
    queries = [
        f"`?{parameter['name']}` {_kind(parameter['schema'])}".rstrip()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    ]
    key = ", ".join(_KEYS[name] for need in operation.get("security", ()) for name in need)
    status, answer = next(iter(operation["responses"].items()))
    body = _content(operation.get("requestBody", {}))
    text = " ".join([_cell(operation.get("description", "")), *(f"{query}." for query in queries)])
    content = "OpenAI's, and `lora`" if path in _OF_OPENAI else _content(answer)
    shown = " or ".join(filter(None, [content, _events(answer)]))
    number = "" if status == "200" else f"{status} "
    return f"| `{method} {path}` | {key} | {body} | {number}{shown} | {text} |"


def _content(part: Schema) -> str:
    schema = part.get("content", {}).get("application/json", {}).get("schema", {})
    return _kind(schema) if schema else ""


def _events(answer: Schema) -> str:
    kinds = {"text/event-stream": "events", "image/svg+xml": "SVG", "text/plain": "text"}
    return " or ".join(kinds[kind] for kind in answer.get("content", {}) if kind in kinds)


def _type(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}\n"
    if description := schema.get("description"):
        yield f"{_cell(description)}\n"
    if not schema.get("properties"):
        yield f"{_kind(schema)}\n"
        return
    required = schema.get("required", ())
    yield "| field | | default | |"
    yield "|---|---|---|---|"
    for field, kind in schema["properties"].items():
        default = kind.get("default")
        shown = f"`{json.dumps(default)}`" if default is not None else ""
        if field in required:
            shown = "required" if "title" in schema and _is_body(schema) else ""
        yield f"| `{field}` | {_kind(kind)} | {shown} | {_cell(kind.get('description', ''))} |"
    yield ""


def _is_body(schema: Schema) -> bool:
    """Whether clients write it: what they send may hold nothing unknown."""
    return schema.get("additionalProperties") is False


def _kind(schema: Schema) -> str:
    """A schema in a few words; `null` is not said of what may be left out."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_kind(kind) for kind in schema[several] if kind.get("type") != "null"]
            return " or ".join(kinds)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        kind = f"list of {_kind(schema.get('items', {}))}"
    if schema.get("format") == "date-time":
        kind = "time"
    return f"{kind}{_limits(schema)}"


def _limits(schema: Schema) -> str:
    words = (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
        ("maxLength", "of at most"),
        ("maxItems", "of at most"),
    )
    return "".join(f" {word} {schema[key]}" for key, word in words if key in schema)


def _cell(text: str) -> str:
    """Text as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _roots(document: Document) -> Iterator[str]:
    yield "ErrorResponse"
    yield "LoraReport"
    for path, _, operation in _operations(document):
        parts = [operation.get("requestBody", {})]
        if path not in _OF_OPENAI:
            parts += operation["responses"].values()
        yield from _names(parts)


def _reached(schemas: dict[str, Schema], roots: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _names(schemas[name])
    return found


def _names(part: object) -> Iterator[str]:
    """Every type that a part of the document refers to."""
    if isinstance(part, dict):
        if isinstance(reference := part.get("$ref"), str):
            yield reference.rpartition("/")[2]
        for value in part.values():
            yield from _names(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _names(value)
