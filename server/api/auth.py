"""Bearer keys: one for `/v1`, another for what changes the server. Compared in constant time.

Each is a dependency of the routes it guards and runs before their body is read.
"""

import hmac
from collections.abc import Awaitable, Callable

from fastapi import Request
from pydantic import SecretStr

from server.config import Settings
from server.errors import Forbidden, Unauthorized

Guard = Callable[[Request], Awaitable[None]]


def api_guard(settings: Settings) -> Guard:
    """Requires the API key, where one is set."""

    async def guard(request: Request) -> None:
        if settings.api_key is not None and not _holds(request, settings.api_key):
            raise Unauthorized("an API key is required: send 'Authorization: Bearer KEY'")

    return guard


def admin_guard(settings: Settings) -> Guard:
    """Requires the admin key; refuses everyone where none is set."""

    async def guard(request: Request) -> None:
        if settings.admin_key is None:
            raise Forbidden(
                "this route is off because the server has no admin key; "
                "start it with --admin-key or FATHOM_ADMIN_KEY"
            )
        if _holds(request, settings.admin_key):
            return
        if settings.api_key is not None and _holds(request, settings.api_key):
            raise Forbidden("this route needs the admin key; the API key does not open it")
        raise Unauthorized("the admin key is required: send 'Authorization: Bearer KEY'")

    return guard


def _holds(request: Request, key: SecretStr) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(
        given.strip().encode("utf-8"), key.get_secret_value().encode("utf-8")
    )
