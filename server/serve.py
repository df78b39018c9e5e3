"""`fathom serve`: take the port, load, announce, answer until told to stop.

The port is bound and the database tried before the model loads, so that a port in use is known at
once; it is listened to only when everything is loaded, so that no connection waits on the load.

Told to stop it drains: it goes on listening, so that `/ready` and new requests are answered 503 and not
cut off, until what was accepted has finished or its time is over. Then each stream still open gets an
error as its last event. A second signal ends that time at once. When the engine is dead the process ends,
status 1, for its supervisor to start another.
"""

import json
import shlex
import signal
import socket
import sys
import time
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import structlog
import uvicorn

from server import __version__, demo
from server.access.service import needs_key
from server.api.app import create_app
from server.calibration.service import check_store
from server.config import ConfigError, Settings, flag, variable
from server.connections import Connections
from server.engine.protocol import Engine
from server.environment import traces_endpoint
from server.errors import Draining
from server.exit_guard import EXIT_S, ExitGuard
from server.garbage import leave_out_what_is_there
from server.http_protocol import BoundedHttpProtocol
from server.loading import load_engine, with_demo
from server.logs import configure_logs
from server.malloc import keep_little
from server.open_files import raise_limit

if TYPE_CHECKING:
    from server.api.tracing import Tracing

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 75
"""An idle connection is kept longer than clients' pools keep theirs (5 s in httpx, 60 s in many
proxies), so that it is the client who closes it: the other way round a request can be sent into a
connection that is just being closed."""

FLUSH_S = 3
"""How long clients may take to read what is left for them once nothing more is made."""

TICKS_BETWEEN_LOOKS = 50
"""Of a tenth of a second, between two looks at connections that are closed and not gone."""

MAX_ANNOUNCED = 16
"""Adapters that are named when the server is ready; `/v1/models` has them all."""


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; 0 after a clean stop, 1 if the engine died."""
    configure_logs(settings.log_level, settings.log_format, shows_prompts=settings.log_prompts)
    keep_little()
    tracing = open_tracing()
    connections = Connections.within(raise_limit, settings.max_connections)
    with bind(settings.host, settings.port) as listener:
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, _exit)
        address = listener.getsockname()[0]
        asks_for_keys = check_store(settings, partial(needs_key, settings))
        if not asks_for_keys and not ip_address(address).is_loopback:
            if not settings.insecure:
                raise ConfigError(
                    f"{flag('host')}: other machines could ask at {address}, and no API key is set: "
                    f"set {variable('api_key')}, make keys with `fathom keys add`, or say "
                    f"{flag('insecure')} to let anybody ask"
                )
            log.warning("other machines can ask, and no API key is set", address=address)
        settings = with_demo(settings)
        engine = load_engine(settings)
        guard = ExitGuard(lambda: engine.is_alive)
        try:
            url = base_url(listener)
            server = AnnouncingServer(
                settings,
                engine,
                url,
                guard,
                connections,
                tracing,
                asks_for_keys=asks_for_keys,
            )
            leave_out_what_is_there()
            server.run(sockets=[listener])
            is_well = server.started and engine.is_alive
        finally:
            if engine.is_alive:
                engine.shutdown()
                guard.stop()  # else it sees to it that whatever hangs does not keep the process
            if tracing is not None:
                tracing.shutdown()
    return 0 if is_well else 1


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ConfigError where the address is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{flag('host')}: {host!r}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{flag('port')}: {host}:{port}: {error.strerror}") from None
    return listener


def base_url(listener: socket.socket) -> str:
    """Where clients on this machine reach the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class AnnouncingServer(uvicorn.Server):
    """A uvicorn server that says on standard output when, where and how it can be asked.

    The first line it prints is `ready URL`, for programs that start it. Told to stop, it drains.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        url: str,
        guard: ExitGuard,
        connections: Connections,
        tracing: "Tracing | None" = None,
        *,
        asks_for_keys: bool,
    ) -> None:
        app = create_app(settings, engine, tracing, connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(BoundedHttpProtocol, connections=connections),  # type: ignore[arg-type]
                ws="none",  # a library that happens to be there would take connections over
                log_config=None,
                access_log=False,  # the application has its own, without query strings
                server_header=False,
                timeout_graceful_shutdown=FLUSH_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._announcement = announcement(settings, engine, url, asks_for_keys=asks_for_keys)
        self._readiness = app.state.readiness
        self._engine = engine
        self._guard = guard
        self._connections = connections
        self._drain_timeout_s = settings.drain_timeout_s
        self._drained_by_s = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then announce."""
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(self._announcement)
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal: the first begins to drain, the next ends it."""
        patience_s = 0.0 if self._readiness.is_draining else self._drain_timeout_s
        self._readiness.is_draining = True
        self._drained_by_s = time.monotonic() + patience_s
        self._guard.end_within(patience_s + EXIT_S)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to leave the loop, and cut what is left then."""
        if self._readiness.is_draining:
            is_overdue = time.monotonic() >= self._drained_by_s
            if is_overdue and self.server_state.tasks:
                self._engine.end_all(
                    Draining("the server is stopping and could not wait any longer")
                )
            self.should_exit = is_overdue or not self.server_state.tasks
        if not self._engine.is_alive:
            self.should_exit = True
        if counter % TICKS_BETWEEN_LOOKS == 0:
            self._connections.look_after()
        return await super().on_tick(counter)


def announcement(
    settings: Settings, engine: Engine, url: str, *, asks_for_keys: bool = False
) -> str:
    """The ready line, what is served, and a `curl` line to paste."""
    adapters = [adapter.name for adapter in engine.adapters()]
    model = adapters[0] if adapters else engine.info.name
    body: dict[str, object] = {
        "model": model,
        "prompt": demo_prompt(settings, model) or "Once upon a time",
        "max_tokens": 48,
        "temperature": 0,
    }
    if adapters:
        body["lora_depth"] = engine.info.num_layers
    is_keyed = asks_for_keys or settings.api_key is not None
    key = ' -H "Authorization: Bearer $FATHOM_API_KEY"' if is_keyed else ""
    curl = f"curl {url}/v1/completions -H 'Content-Type: application/json'{key}"
    served = f"{engine.info.name}, {engine.info.num_layers} layers"
    depths = f"Then try every lora_depth from 0, the base model, to {engine.info.num_layers}.\n\n"
    named = ", ".join(adapters[:MAX_ANNOUNCED]) or "none"
    if len(adapters) > MAX_ANNOUNCED:
        named += f" and {len(adapters) - MAX_ANNOUNCED} more"
    return (
        f"ready {url}\n\n"
        f"Fathom {__version__} serves {served}; adapters: {named}\n"
        f"Paste this to ask it:\n\n  {curl} \\\n    -d {shlex.quote(json.dumps(body))}\n\n"
        f"{depths if adapters else ''}"
    )


def demo_prompt(settings: Settings, adapter: str) -> str | None:
    """A prompt of the kind that a demo adapter was trained on; None for any other adapter."""
    path = demo.adapters().get(adapter)
    if path is None or settings.adapter.get(adapter) != path:
        return None
    with demo.valid_path(adapter).open(encoding="utf-8") as samples:
        prompt: str = json.loads(samples.readline())["prompt"]
    return prompt


def open_tracing() -> "Tracing | None":
    """Where traces go, if OpenTelemetry's variables say so: only then is any of it imported."""
    endpoint = traces_endpoint()
    if endpoint is None:
        return None
    from server.api.tracing import Tracing

    return Tracing.to(endpoint)


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
