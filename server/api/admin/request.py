"""What an admin request names: its sender, and an adapter."""

from pathlib import Path

from fastapi import Request

from server.api.auth import caller
from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import BadRequest, NotFound
from server.sources import location
from server.sources.location import RemoteAdapter


def actor(http: Request) -> str:
    """How the audit trail calls whoever sent this request: by key, and by the request's id.

    The key of the flag, which many may hold, is `admin`.
    """
    key = caller(http)
    name = "admin" if key.source == "flag" else f"key-{key.id}"
    return f"{name}:{http.scope['state']['request_id']}"


def known_adapter(engine: Engine, name: str) -> AdapterRef:
    """An adapter that was named or loaded, without its weights. Raises NotFound."""
    adapter = engine.adapter(name)
    if adapter is None:
        raise NotFound(f"adapter {name!r} is not loaded", param="name", code="adapter_not_found")
    return adapter


async def read_adapter(engine: Engine, name: str) -> AdapterRef:
    """The same with a digest, for which its weights are read if they never were. Raises AdapterError.

    One below the adapter root need not have been asked for: of several servers that share it and a
    database, any may be asked.
    """
    adapter = engine.adapter(name)
    if adapter is not None and adapter.digest is not None:
        return adapter
    try:
        return await engine.resolve(name)
    except NotFound:
        return known_adapter(engine, name)


def adapter_location(text: str, param: str) -> Path | RemoteAdapter:
    """Where an adapter is said to lie. Raises BadRequest, without text that may be a credential."""
    try:
        return location.parse(text)
    except location.LocationError as error:
        raise BadRequest(f"{param!r} {error}", param=param, code="bad_adapter_path") from None
