"""The application that Ray Serve runs: `fathom_ray.application:app`.

Each replica is a whole server, the HTTP application and its engine in one process, with the settings that
`fathom serve` would have there: `FATHOM_*` and a TOML file. How many replicas there are, what each may
use and how requests find one is Serve's configuration; `serve.yaml` has all of it.
"""

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.applications import Starlette

from fathom_ray.named_replica import NamedReplicaMiddleware
from fathom_ray.one_replica import OneReplicaMiddleware
from server.access.service import needs_key
from server.api.app import create_app
from server.calibration.service import open_store
from server.config import ConfigError, Settings, flag, variable
from server.environment import load_settings
from server.garbage import leave_out_what_is_there
from server.loading import load_engine, with_demo
from server.logs import configure_logs
from server.malloc import keep_little
from server.serve import open_tracing

ROUTER = "fathom_ray.router.AdapterAffinityRouter"

MAX_ONGOING_REQUESTS = 128
"""Of one replica; what comes beyond it waits at the proxies. Twice `max_num_seqs` keeps steps full while
finished requests are replaced."""

TARGET_ONGOING_REQUESTS = 48
"""Of one replica, on average: below `max_num_seqs`, so that there is room while another starts."""


@serve.deployment(
    name="Fathom",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    autoscaling_config=AutoscalingConfig(
        min_replicas=1, max_replicas=4, target_ongoing_requests=TARGET_ONGOING_REQUESTS
    ),
    request_router_config=RequestRouterConfig(
        request_router_class=ROUTER, request_routing_stats_period_s=1.0
    ),
    health_check_period_s=5.0,
    graceful_shutdown_timeout_s=60.0,
)
@serve.ingress()
class Replica:
    """One server of the fleet."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        """Load. Raises ConfigError, ModelError, AdapterError or StoreUnavailable, and Serve tells."""
        settings = load_settings()
        configure_logs(settings.log_level, settings.log_format, shows_prompts=settings.log_prompts)
        keep_little()
        await check_shared(settings)
        self._settings = with_demo(settings)
        self._tracing = open_tracing()
        self._engine = load_engine(self._settings)
        leave_out_what_is_there()

    def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Serve once, after the constructor; the lifespan runs on Serve's loop."""
        app = create_app(self._settings, self._engine, self._tracing)
        app.add_middleware(OneReplicaMiddleware)
        app.add_middleware(
            NamedReplicaMiddleware, name=serve.get_replica_context().replica_id.unique_id
        )
        return app

    def check_health(self) -> None:
        """Called by Serve: a replica whose engine is dead or stuck is replaced."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine has died or is stuck")

    def record_routing_stats(self) -> dict[str, list[str]]:
        """Called by Serve once a second: what the router may know. See `router`."""
        base = self._engine.info.name  # asked for as an adapter is, and every replica has it
        held: dict[str, list[str]] = {"device": [base], "host": [], "disk": []}
        for adapter in self._engine.adapters():
            held[self._engine.residency(adapter)].append(adapter.name)
        del held["disk"]
        return held

    async def __del__(self) -> None:
        """Called by Serve after the lifespan has ended."""
        engine = getattr(self, "_engine", None)
        if engine is not None and engine.is_alive:
            engine.shutdown()
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.shutdown()


async def check_shared(settings: Settings) -> None:
    """Refuse what is safe for one server alone. Raises ConfigError or StoreUnavailable."""
    is_kept = settings.admin_key is not None or settings.keys_file is not None
    if is_kept and settings.database is None:
        raise ConfigError(
            f"{variable('database')}: replicas with keys share what they keep: name a database that "
            "all of them reach"
        )
    store = await open_store(settings)
    try:
        is_keyed = await needs_key(settings, None if store is None else store.database)
    finally:
        if store is not None:
            await store.close()
    if not is_keyed and not settings.insecure:
        raise ConfigError(
            f"{variable('api_key')}: is not set, and a replica cannot know who reaches Serve's proxies: "
            f"set it, make keys with `fathom keys add`, or say {flag('insecure')} "
            f"({variable('insecure')}=true) to let anybody ask"
        )


app = Replica.bind()  # type: ignore[attr-defined]  # the decorator's
