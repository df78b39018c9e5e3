"""What an admin request names: its sender, and an adapter."""

from fastapi import Request

from server.api.auth import caller
from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import NotFound


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
