"""Parts of JSON schemas that are written by hand."""

from typing import Any


def closed_object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object with these fields and no others, so that a misspelt one is refused."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required),
    }
