"""Bytes of a request body -> wire model: size, encoding, JSON and types, each failing by name.

Reads the body itself, because the framework's reader accepts NaN, keeps the last of two equal
keys, answers an oversized body in plain text, and reads before the key is checked. Used by every
route that takes a body, as `Depends(json_body(Model))` after the route's key check.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from server.errors import BadRequest, PayloadTooLarge, UnsupportedField

Wire = TypeVar("Wire")

MAX_SHOWN = 100
"""Characters of a refused value, or of a field's path, that an error message repeats."""


def json_body(model: type[Wire], max_bytes: int) -> Callable[[Request], Awaitable[Wire]]:
    """A dependency that reads the request's body as `model`."""
    adapter = TypeAdapter(model)

    async def read(request: Request) -> Wire:
        content = parse_json(await read_bytes(request, max_bytes))
        try:
            return adapter.validate_python(content)
        except ValidationError as error:
            raise bad_field(error, content) from None

    return read


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The whole body; refused as soon as its declared or received size is over the limit."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise BadRequest(
            f"Content-Type must be application/json, got {shown(media_type)}",
            param="content-type",
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared[:20]) if declared.isascii() and declared.isdigit() else 0
    body = bytearray()
    if num_bytes <= max_bytes:
        async for part in request.stream():
            body += part
            num_bytes = max(num_bytes, len(body))
            if num_bytes > max_bytes:
                break
    if num_bytes > max_bytes:
        raise PayloadTooLarge(
            f"the request body is over the limit of {max_bytes} bytes (got at least {num_bytes})"
        )
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no Infinity, no repeated key, no lone surrogate."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_json(f"is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    try:
        content = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise _bad_json(
            f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except UnicodeEncodeError:
        raise _bad_json("holds a lone surrogate, which is no Unicode text") from None
    except RecursionError:
        raise _bad_json("is nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise _bad_json(f"holds a number that cannot be read: {error}") from None
    return content


def bad_field(error: ValidationError, content: Any) -> BadRequest:
    """The first thing wrong with a body, naming the field and the value given."""
    details = error.errors(include_url=False)
    first = details[0]
    param, value = _locate(first, content)
    match first["type"]:
        case "unknown_field":
            return BadRequest(f"unknown field '{param}'", param=param, code="unknown_field")
        case "unsupported_field":
            return UnsupportedField(f"'{param}' is not supported: {first['msg']}", param=param)
        case "missing":
            return BadRequest(f"field '{param}' is required", param=param, code="missing_field")
    same = (item["msg"] for item in details if _locate(item, content)[0] == param)
    wanted = "; or ".join(dict.fromkeys(same))
    subject = "the request body" if param is None else f"'{param}'"
    return BadRequest(f"{subject} is wrong: {wanted} (got {shown(value)})", param=param)


def shown(value: object) -> str:
    """A value as an error message repeats it: its JSON-like form, cut when it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _locate(detail: ErrorDetails, content: Any) -> tuple[str | None, Any]:
    """The path of an error, without the names of union members that pydantic puts in between."""
    path, value = "", content
    for part in detail["loc"]:
        if isinstance(value, dict) and part in value:
            path, value = f"{path}.{part}", value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
    if detail["type"] == "missing":
        path = f"{path}.{detail['loc'][-1]}"
    elif detail["type"] in ("unknown_field", "unsupported_field"):
        path = f"{path}.{detail['ctx']['name']}"
    return path.lstrip(".")[:MAX_SHOWN] or None, value


def _no_constant(name: str) -> NoReturn:
    raise _bad_json(f"holds {name}, which is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in pairs:
        if name in keys:
            raise BadRequest(f"field {shown(name)} is given more than once", param=name[:MAX_SHOWN])
        keys[name] = value
    return keys


def _bad_json(what: str) -> BadRequest:
    return BadRequest(f"the request body {what}", code="invalid_json")
