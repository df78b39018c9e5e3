"""Bearer keys: who sends a request, and whether that may be.

Each guard is a dependency of the routes it guards and runs before their body is read. It leaves the
sender in the request's state, where `caller` finds it.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.access.key import NOBODY, Key
from server.access.rate_limits import KeyRates
from server.access.service import Access
from server.errors import Forbidden, Unauthorized

Shown = HTTPAuthorizationCredentials | None
Guard = Callable[[Request, Shown], Awaitable[None]]

# What the OpenAPI document says of a route it says because the route has the guard that asks for it.
API_KEY = HTTPBearer(
    scheme_name="api_key",
    description="An API key, or an admin key. A server without API keys answers without one.",
    auto_error=False,
)
ADMIN_KEY = HTTPBearer(
    scheme_name="admin_key",
    description="An admin key. On a server without one these routes are off.",
    auto_error=False,
)


def api_guard(access: Access) -> Guard:
    """Requires an API key, unless there is none."""

    async def guard(request: Request, shown: Annotated[Shown, Security(API_KEY)]) -> None:
        key: Key | None = NOBODY
        if not access.keyring.is_api_open:
            key = await access.keyring.identify(_secret(shown), "api")
        if key is None or key.scope != "api":
            raise Unauthorized("an API key is required: send 'Authorization: Bearer KEY'")
        request.state.key = key
        request.state.rates = access.limits.of(key)

    return guard


def admin_guard(access: Access) -> Guard:
    """Requires an admin key; refuses everyone where there is none."""

    async def guard(request: Request, shown: Annotated[Shown, Security(ADMIN_KEY)]) -> None:
        if not access.keyring.has_admin:
            raise Forbidden(
                "this route is off because the server has no admin key; "
                "start it with --admin-key or FATHOM_ADMIN_KEY"
            )
        key = await access.keyring.identify(_secret(shown), "admin")
        if key is None:
            raise Unauthorized("the admin key is required: send 'Authorization: Bearer KEY'")
        if key.scope != "admin":
            raise Forbidden("this route needs the admin key; the API key does not open it")
        request.state.key = key

    return guard


async def count_request(request: Request) -> None:
    """A dependency after `api_guard`, of routes that do work. Raises RateLimited."""
    rates(request).take_request()


def caller(request: Request) -> Key:
    """Whoever sent a request that a guard let in."""
    key = request.state.key
    assert isinstance(key, Key)
    return key


def rates(request: Request) -> KeyRates:
    """The buckets of whoever sent a request that `api_guard` let in."""
    found = request.state.rates
    assert isinstance(found, KeyRates)
    return found


def _secret(shown: Shown) -> str:
    """The key that a request shows; empty, which no key is, where it shows none."""
    return "" if shown is None else shown.credentials.strip()
