"""Bytes of a request body -> wire model: size, time, encoding, JSON and types, each failing by name.

Reads the body itself, because the framework's reader accepts NaN, keeps the last of two equal
keys, answers an oversized body in plain text, and reads before the key is checked. Used by every
route that takes a body, as `Depends(json_body(Model))` after the route's key check.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from server.api.json_text import MAX_SHOWN, json_text, shown
from server.errors import BadRequest, BodyTimeout, PayloadTooLarge, UnsupportedField

Wire = TypeVar("Wire")

BODY_TIMEOUT_S = 60.0
"""How long a client may take to send a body: a connection that stops halfway is not kept."""


def json_body(model: type[Wire], max_bytes: int) -> Callable[[Request], Awaitable[Wire]]:
    """A dependency that reads the request's body as `model`."""
    adapter = TypeAdapter(model)

    async def read(request: Request) -> Wire:
        content = _parsed(await read_bytes(request, max_bytes))
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
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for part in request.stream():
                    body += part
                    num_bytes = max(num_bytes, len(body))
                    if num_bytes > max_bytes:
                        break
        except TimeoutError:
            raise BodyTimeout(
                f"the request body was not sent within the limit of {BODY_TIMEOUT_S:g} s"
            ) from None
    if num_bytes > max_bytes:
        raise PayloadTooLarge(
            f"the request body is over the limit of {max_bytes} bytes (got at least {num_bytes})"
        )
    return bytes(body)


def _parsed(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is {body[error.start]:#04x}"
        raise BadRequest(f"the request body is not UTF-8: {what}", code="invalid_json") from None
    try:
        return json_text(text)
    except BadRequest as error:
        raise BadRequest(
            f"the request body {error.message}", param=error.param, code=error.code
        ) from None


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
