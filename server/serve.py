"""`fathom serve`: take the port, load, announce, answer until told to stop.

The port is bound and the database tried before the model loads, so that a port in use is known at
once; it is listened to only when everything is loaded, so that no connection waits on the load.
"""

import json
import shlex
import signal
import socket
import sys
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn

from server import __version__, demo
from server.access.service import needs_key
from server.api.app import create_app
from server.calibration.service import check_store
from server.config import ConfigError, Settings, flag, variable
from server.engine.protocol import Engine
from server.loading import load_engine, with_demo
from server.logs import configure_logs

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 75
"""An idle connection is kept longer than clients' pools keep theirs (5 s in httpx, 60 s in many
proxies), so that it is the client who closes it: the other way round a request can be sent into a
connection that is just being closed."""

MAX_ANNOUNCED = 16
"""Adapters that are named when the server is ready; `/v1/models` has them all."""


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; 0 after a clean stop."""
    configure_logs(settings.log_level)
    with bind(settings.host, settings.port) as listener:
        # uvicorn finishes open requests on a signal and then raises that signal again.
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
        try:
            url = base_url(listener)
            server = AnnouncingServer(settings, engine, url, asks_for_keys=asks_for_keys)
            server.run(sockets=[listener])
        finally:
            engine.shutdown()
    return 0 if server.started else 1


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

    The first line it prints is `ready URL`, for programs that start it. Told to stop, it is no longer
    ready, so that a load balancer looks elsewhere while open requests finish.
    """

    def __init__(
        self, settings: Settings, engine: Engine, url: str, *, asks_for_keys: bool
    ) -> None:
        app = create_app(settings, engine)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=settings.log_level == "debug",
                server_header=False,
                timeout_graceful_shutdown=settings.shutdown_timeout_s,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._announcement = announcement(settings, engine, url, asks_for_keys=asks_for_keys)
        self._readiness = app.state.readiness

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then announce."""
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(self._announcement)
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        self._readiness.is_draining = True
        super().handle_exit(sig, frame)


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


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
