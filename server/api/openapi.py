"""The OpenAPI document.

Bodies are read by `body.py` and not by the framework, so their schemas are written in here, from
the same wire models.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def body_of(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """A route's `openapi_extra`: its body is `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}
    }


def document(app: FastAPI, bodies: Iterable[type[BaseModel]]) -> None:
    """Make `app.openapi()` complete: the routes' own schemas and those of `bodies`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in bodies], ref_template=_REF
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
