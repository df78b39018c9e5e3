"""The real engine behind the real HTTP server, in this process, where a test can look inside.

The model is the readable Llama of `tests/live`. Every request that enters the engine and every end
that leaves it is counted, and what the engine holds is there to be asked when it is quiet.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import SecretStr

from server.api.app import create_app
from server.config import Settings
from server.connections import Connections
from server.engine.async_engine import AsyncEngine
from server.engine.core import EngineCore
from server.engine.outbox import Outbox
from server.engine.request import Request, RequestOutput
from server.http_protocol import BoundedHttpProtocol
from tests.live.process import LLAMA, save_readable_model
from tests.parity.adapters import save_adapter
from tests.tiny import Tiny, assert_everything_is_back, load_tiny, make_core

API_KEY, ADMIN_KEY = "key-of-a-client", "key-of-an-operator"
ADAPTERS = ("tuned", "deep")
"""Names that no fuzzer comes upon by chance."""
MAX_POLLS = 20_000


class WatchedOutbox(Outbox):
    """Counts ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: Counter[str] = Counter()

    def hold(self, outputs: Iterable[RequestOutput]) -> None:
        super().hold(self._counted(outputs))

    def deliver(self, outputs: Iterable[RequestOutput] = ()) -> None:
        super().deliver(self._counted(outputs))

    def _counted(self, outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
        given = list(outputs)
        self.ended.update(output.request_id for output in given if output.finished)
        return given


class WatchedEngine(AsyncEngine):
    """Counts who comes and who leaves."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.added: Counter[str] = Counter()
        add = core.add

        def add_counted(request: Request) -> None:
            self.added[request.id] += 1
            add(request)

        core.add = add_counted  # type: ignore[method-assign]
        super().__init__(core, max_live_requests=64)
        self._outbox = self._thread._outbox = WatchedOutbox()
        core.runner.before_forward = self._outbox.deliver

    @property
    def ended(self) -> Counter[str]:
        """How often each request did."""
        return self._outbox.ended

    def wait_until_quiet(self) -> None:
        """Until nothing runs or waits; requests whose clients left end a step later."""
        for _ in range(MAX_POLLS):
            if not self._outbox.mailboxes and self.added.total() == self.ended.total():
                return
            time.sleep(0.005)
        raise AssertionError(f"never quiet: {(self.added - self.ended)}, {self.stats()}")

    def assert_invariants(self) -> None:
        """Every request ended once, and nothing is held: no block, no slot."""
        self.wait_until_quiet()
        assert set(self.added.values()) <= {1}
        assert self.added == self.ended
        stats = self.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks
        assert self.core.runner.slots.num_users == 0


def make_model(directory: Path) -> Tiny:
    """The readable Llama and two adapters below `directory`, loaded."""
    model_path = save_readable_model(directory / "model")
    for seed, name in enumerate(ADAPTERS):
        save_adapter(LLAMA, ("plain", "dora")[seed], directory / "adapters" / name, seed=seed)
    return load_tiny(model_path, directory / "adapters")


@contextmanager
def served(tiny: Tiny, directory: Path, **settings: Any) -> Iterator[tuple[str, WatchedEngine]]:
    """The server's URL and its engine. On the way out everything must be back where it was."""
    given: dict[str, Any] = {
        "adapter_root": tiny.adapter_root,
        "data_root": directory,
        "api_key": SecretStr(API_KEY),
        "admin_key": SecretStr(ADMIN_KEY),
        "database": SecretStr(f"sqlite:///{directory / 'fathom.db'}"),
        "max_body_bytes": 64 << 10,
        "max_n": 3,
        "max_logprobs": 5,
        "max_num_waiting": 64,
    } | settings
    core = make_core(tiny, num_blocks=24, **given)
    engine = WatchedEngine(core)
    connections = Connections(1000, 100)
    all_settings = Settings(model=str(tiny.model_path), **given)
    app = create_app(all_settings, engine, connections=connections)
    config = uvicorn.Config(
        app,
        port=0,
        http=partial(BoundedHttpProtocol, connections=connections),  # type: ignore[arg-type]
        log_config=None,
        ws="none",
        lifespan="on",
    )
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        for _ in range(MAX_POLLS):
            if server.started:
                break
            time.sleep(0.005)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()
        engine.shutdown()
    assert_everything_is_back(core)
