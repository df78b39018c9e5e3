"""What an admin request names: its sender, and an adapter."""

from fastapi import Request

from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import NotFound


def actor(http: Request) -> str:
    """How the audit trail calls whoever sent this request."""
    return f"admin:{http.scope['state']['request_id']}"


def known_adapter(engine: Engine, name: str) -> AdapterRef:
    """An adapter that was loaded, without its weights. Raises NotFound."""
    for adapter in engine.adapters():
        if adapter.name == name:
            return adapter
    raise NotFound(f"adapter {name!r} is not loaded", param="name", code="adapter_not_found")
