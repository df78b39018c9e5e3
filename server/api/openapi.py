"""The OpenAPI document.

Bodies are read by `body.py` and not by the framework, so their schemas are written in here, from
the same wire models. So are the errors that any route may answer, which have one shape.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "With `stream`, server-sent events.", "content": {"text/event-stream": {}}}
}
"""The `responses` of a route that can stream."""


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    """The field, query parameter or header at fault."""
    code: str | None
    """A stable word for programs."""


class ErrorResponse(BaseModel):
    """Every error, of every route."""

    error: ErrorBody


_ERRORS = {
    "4XX": "The request is wrong, not allowed, or names what does not exist.",
    "5XX": "The server is full, draining, out of time, or has failed.",
}


def body_of(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """A route's `openapi_extra`: its body is `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}
    }


def query_of(**parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A route's `openapi_extra`: its query may hold these, which `query` reads."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": dict(schema)}
            for name, schema in parameters.items()
        ]
    }


def document(app: FastAPI, bodies: Iterable[type[BaseModel]]) -> None:
    """Make `app.openapi()` complete: the routes' own schemas, those of `bodies`, and errors."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            models: list[type[BaseModel]] = [*bodies, ErrorResponse]
            _, definitions = models_json_schema(
                [(model, "validation") for model in models], ref_template=_REF
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(definitions["$defs"])
            for operations in schema["paths"].values():
                for operation in operations.values():
                    _add_errors(operation["responses"])
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_errors(responses: dict[str, Any]) -> None:
    """The framework's own refusal of a parameter is never sent, as `query` checks those."""
    responses.pop("422", None)
    error = {"application/json": {"schema": {"$ref": _REF.format(model="ErrorResponse")}}}
    for status, description in _ERRORS.items():
        responses[status] = {"description": description, "content": error}
