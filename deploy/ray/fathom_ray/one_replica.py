"""Refuses what would change one replica and leave the others as they are.

Loading and unloading at run time is kept in the memory of the process that was asked. In a fleet the next
request may come to another one, so adapters come from the adapter root, which every replica reads when
it is first asked for a name. All else below `/admin` is in the database, whichever replica is asked.
"""

import re

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_response import error_json
from server.errors import Conflict

LOADS = {
    "POST": re.compile(r"/v1/(un)?load_lora_adapter"),
    "PUT": re.compile(r"/admin/adapters/[^/]+"),
    "DELETE": re.compile(r"/admin/adapters/[^/]+"),
}

REFUSAL = Conflict(
    "this server is one replica of several, and would be the only one to know: put the adapter below "
    "the adapter root, where each of them finds it by its name",
    code="many_replicas",
)


class OneReplicaMiddleware:
    """Answers those requests itself, also to those who have no key: it says nothing that is secret."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on."""
        paths = LOADS.get(scope.get("method", ""))
        if scope["type"] == "http" and paths is not None and paths.fullmatch(scope["path"]):
            response = Response(error_json(REFUSAL), REFUSAL.status, media_type="application/json")
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)
