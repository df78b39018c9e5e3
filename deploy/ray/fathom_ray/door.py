"""What Serve's HTTP proxies run before and after a request: `middlewares`, which Serve calls by name.

A node's environment names it: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=fathom_ray.door.middlewares
"""

from starlette.middleware import Middleware

from fathom_ray.hint import HintMiddleware
from fathom_ray.lost_replica import LostReplicaMiddleware


def middlewares() -> list[Middleware]:
    """Called by each proxy when it starts."""
    return [Middleware(LostReplicaMiddleware), Middleware(HintMiddleware)]
