"""Query strings and numbers in paths: checked by name, with errors in the server's own shape."""

import re

from fastapi import Request

from server.api.json_text import shown
from server.errors import BadRequest

LIMIT = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
"""What `limit` takes, as the OpenAPI document says it."""
FLAG = {"enum": ["", "true", "1", "false", "0"], "default": "false"}
"""The same of `flag`."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def check_names(http: Request, *known: str) -> None:
    """Refuse a query that holds anything but these names, each once."""
    names = [name for name, _ in http.query_params.multi_items()]
    for name in names:
        if name not in known:
            takes = f"; known are {', '.join(known)}" if known else ""
            raise BadRequest(
                f"unknown query parameter {shown(name)}{takes}", param=name, code="unknown_field"
            )
        if names.count(name) > 1:
            raise BadRequest(f"query parameter {name!r} is given more than once", param=name)


def integer(text: str, name: str, low: int, high: int) -> int:
    """A number from a path or query, within its limits."""
    value = int(text) if _INTEGER.fullmatch(text) else None
    if value is None or not low <= value <= high:
        raise BadRequest(
            f"'{name}' must be an integer from {low} to {high} (got {shown(text)})", param=name
        )
    return value


def limit(http: Request, most: int = 1000) -> int:
    """`?limit=`, by default 100."""
    return integer(http.query_params.get("limit", "100"), "limit", 1, most)


def text(http: Request, name: str) -> str | None:
    """`?name=`, which a database is asked for; None if it is missing."""
    value = http.query_params.get(name)
    if value is not None and "\x00" in value:
        raise BadRequest(f"'{name}' holds a NUL character", param=name)
    return value


def flag(http: Request, name: str) -> bool:
    """`?name`, `?name=true` or `?name=false`; false if it is missing."""
    match http.query_params.get(name, "false"):
        case "" | "true" | "1":
            return True
        case "false" | "0":
            return False
        case other:
            raise BadRequest(f"'{name}' must be true or false (got {shown(other)})", param=name)
