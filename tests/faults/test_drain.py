"""A server that is told to stop, on a real socket, by real signals.

The signals go to this very process, whose handlers are the server's while it runs.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from server.connections import Connections
from server.exit_guard import EXIT_S, ExitGuard
from server.serve import AnnouncingServer, base_url, bind
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("process_as_it_was")]

LIMIT_S = 60
BODY: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 8}


class Running:
    """A server, the task that it is, and what its guard was told."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.engine = engine
        self.patience: list[float] = []
        self.guard = ExitGuard(lambda: True, lambda _: None)
        self.guard.stop()
        self.guard.end_within = self.patience.append  # type: ignore[method-assign]
        self.listener = bind("127.0.0.1", 0)
        self.url = base_url(self.listener)
        self.server = AnnouncingServer(
            Settings(**settings),
            engine,
            self.url,
            self.guard,
            Connections(100, 10),
            asks_for_keys=False,
        )
        self.task = asyncio.create_task(self.server.serve([self.listener]))

    def signal(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def ends(self) -> None:
        await asyncio.wait_for(self.task, LIMIT_S)


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    engine = FakeEngine(byte_tokenizer())
    engine.hold_after = 3
    one = Running(engine, **settings)
    # No connection is kept: each request is a new one, as a load balancer's may be.
    limits = httpx.Limits(max_keepalive_connections=0)
    with one.listener:
        async with httpx.AsyncClient(base_url=one.url, limits=limits, timeout=LIMIT_S) as http:
            while not one.server.started:
                await asyncio.sleep(0.01)
            yield one, http
        one.server.should_exit = True
        engine.released.set()
        await one.ends()


async def events_of(response: httpx.Response) -> list[Any]:
    lines = [line async for line in response.aiter_lines() if line]
    texts = [line.removeprefix("data: ") for line in lines]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


async def is_draining(http: httpx.AsyncClient) -> None:
    """Signals are handled between two turns of the event loop."""
    while (await http.get("/ready")).status_code != 503:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
async def test_what_was_accepted_finishes_and_what_comes_is_refused(stream: bool) -> None:
    async with running() as (one, http):
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY | {"stream": stream}))
        await one.engine.held.wait()
        one.signal()
        await is_draining(http)
        assert (await http.get("/ready")).json() == {"status": "draining"}
        assert (await http.get("/health")).status_code == 200
        refused = await http.post("/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "shutting_down"
        assert not one.task.done()
        one.engine.released.set()
        answer = await asking
        if stream:
            assert (await events_of(answer))[-1] == "[DONE]"
        else:
            assert answer.json()["choices"][0]["text"] == "hellohel"
        await one.ends()
        assert one.patience == [30 + EXIT_S]
        assert len(one.engine.requests) == 1


async def test_a_server_with_nothing_to_do_ends_at_once() -> None:
    async with running(drain_timeout_s=10_000) as (one, _):
        one.signal()
        await one.ends()


@pytest.mark.parametrize("way", ["timeout", "second signal"])
@pytest.mark.parametrize("is_told", [True, False])
async def test_what_outlasts_the_patience_gets_an_error_as_its_last_event(
    way: str, is_told: bool
) -> None:
    """The control is cut, as a server cuts that knows nothing of streams."""
    async with running(drain_timeout_s=0.2 if way == "timeout" else 10_000) as (one, http):
        if not is_told:
            one.engine.end_all = lambda _: None  # type: ignore[method-assign,assignment]
        async with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            await one.engine.held.wait()
            whole = asyncio.create_task(http.post("/v1/completions", json=BODY))
            while len(one.engine.requests) < 2:
                await asyncio.sleep(0.01)
            one.signal()
            if way == "second signal":
                await is_draining(http)
                assert not one.task.done()
                one.signal()
            if is_told:
                *chunks, last = await events_of(response)
                assert len(chunks) == 3
                assert last["error"]["code"] == "shutting_down"
                answer = await whole
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
                assert answer.json()["error"]["code"] == "shutting_down"
            else:
                with pytest.raises(httpx.RemoteProtocolError):
                    await events_of(response)
                await asyncio.wait([whole])
        await one.ends()
        assert one.patience[-1] == EXIT_S + (0.2 if way == "timeout" else 0)


async def test_a_dead_engine_ends_the_server_without_a_signal() -> None:
    async with running(drain_timeout_s=10_000) as (one, _):
        one.engine.is_alive = False
        await one.ends()


async def test_a_recalibration_is_not_begun_any_more(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'store.db'}"
    async with running(admin_key="key", database=database) as (one, http):
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await one.engine.held.wait()
        one.signal()
        await is_draining(http)
        refused = await http.post(
            "/admin/adapters/tuned/recalibrate",
            json={"dataset": {"samples": [{"prompt": "a", "completion": "b"}]}},
            headers={"authorization": "Bearer key"},
        )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        one.engine.released.set()
        await asking
        await one.ends()
