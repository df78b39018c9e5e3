"""Every request ends once: by itself, by its client, by the clock, by an error; and is aborted if cut."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.api import disconnect
from server.api.app import create_app
from server.config import Settings
from server.errors import EngineDead, GenerationError, QueueFull, QueueTimeout
from tests.api.asgi import Exchange
from tests.api.conftest import MakeClient
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

COMPLETION: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 8}
CHAT: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 8,
}
ROUTES = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
both_routes = pytest.mark.parametrize(("path", "body"), ROUTES, ids=["completions", "chat"])


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@both_routes
@pytest.mark.parametrize("hold_after", [0, 3])
async def test_a_client_that_leaves_a_whole_response_aborts_it(
    engine: FakeEngine, settings: Settings, path: str, body: dict[str, Any], hold_after: int
) -> None:
    engine.hold_after = hold_after
    exchange = Exchange(create_app(settings, engine), path, body)
    await engine.held.wait()
    exchange.hang_up()
    await exchange.done
    assert engine.aborted == [engine.requests[0].id]


@both_routes
async def test_a_client_that_leaves_a_stream_aborts_it(
    engine: FakeEngine, settings: Settings, path: str, body: dict[str, Any]
) -> None:
    engine.hold_after = 3
    exchange = Exchange(create_app(settings, engine), path, body | {"stream": True})
    await exchange.event()
    await engine.held.wait()
    assert engine.aborted == []
    exchange.hang_up()
    await exchange.done
    assert engine.aborted == [engine.requests[0].id]


async def test_a_client_that_leaves_before_the_first_token_of_a_stream_aborts_it(
    engine: FakeEngine, settings: Settings
) -> None:
    engine.hold_after = 0
    exchange = Exchange(
        create_app(settings, engine), "/v1/completions", COMPLETION | {"stream": True}
    )
    await engine.held.wait()
    exchange.hang_up()
    await exchange.done
    assert engine.aborted == [engine.requests[0].id]


async def test_every_prompt_of_a_batch_is_aborted(engine: FakeEngine, settings: Settings) -> None:
    engine.hold_after = 2
    body = COMPLETION | {"prompt": ["a", "b", "c"], "stream": True}
    exchange = Exchange(create_app(settings, engine), "/v1/completions", body)
    await exchange.event()
    await engine.held.wait()
    exchange.hang_up()
    await exchange.done
    assert sorted(engine.aborted) == [request.id for request in engine.requests]
    assert len(engine.aborted) == 3


async def test_without_the_watch_a_whole_response_runs_on(
    engine: FakeEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The framework alone does not notice: this is what `disconnect.py` is for."""

    async def never(receive: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(disconnect, "_disconnect", never)
    engine.hold_after = 0
    exchange = Exchange(create_app(settings, engine), "/v1/completions", COMPLETION)
    await engine.held.wait()
    exchange.hang_up()
    engine.released.set()
    await exchange.done
    assert engine.aborted == []


@both_routes
async def test_a_finished_request_is_not_aborted(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    for stream in (False, True):
        assert (await client.post(path, json=body | {"stream": stream})).status_code == 200
    assert len(engine.requests) == 2
    assert engine.aborted == []


@both_routes
async def test_a_timeout_is_504_and_aborts(
    make_client: MakeClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.hold_after = 2
    client = make_client(engine, Settings(request_timeout_s=0.05))
    response = await client.post(path, json=body)
    assert response.status_code == 504
    assert "0.05" in response.json()["error"]["message"]
    assert engine.aborted == [engine.requests[0].id]


@both_routes
async def test_a_timeout_in_a_stream_is_its_last_event(
    make_client: MakeClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.hold_after = 2
    client = make_client(engine, Settings(request_timeout_s=0.05))
    response = await client.post(path, json=body | {"stream": True})
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert chunks
    assert last["error"]["code"] == "timeout"
    assert engine.aborted == [engine.requests[0].id]


@both_routes
async def test_an_error_before_the_first_token_has_its_status(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail_after, engine.error = 0, GenerationError("out of blocks")
    for stream in (False, True):
        response = await client.post(path, json=body | {"stream": stream})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "out of blocks"


@both_routes
async def test_an_error_within_a_stream_is_its_last_event(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail_after, engine.error = 3, GenerationError("out of blocks")
    response = await client.post(path, json=body | {"stream": True})
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert len(chunks) >= 3
    assert last == {
        "error": {
            "message": "out of blocks",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }


async def test_one_failing_prompt_fails_its_batch_and_aborts_the_rest(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.fail_after, engine.error = 3, GenerationError("out of blocks")
    response = await client.post("/v1/completions", json=COMPLETION | {"prompt": ["ab", "cd"]})
    assert response.status_code == 500
    await engine.ended.wait()
    assert len(engine.requests) == 2


@both_routes
@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_says_when_to_come_back(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.refusal = QueueFull("1024 requests are waiting", retry_after_s=7)
    response = await client.post(path, json=body | {"stream": stream})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["code"] == "queue_full"


@both_routes
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wait_that_was_too_long_says_when_to_come_back(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    """It ends before its first output, so a stream has a status of its own, too."""
    engine.fail_after, engine.error = 0, QueueTimeout("waited 5 s", retry_after_s=3)
    response = await client.post(path, json=body | {"stream": stream})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "queue_timeout"


@both_routes
async def test_a_dead_engine_is_503(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.is_alive = False
    response = await client.post(path, json=body)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == EngineDead.code


@both_routes
async def test_a_bug_is_500_and_tells_nothing_of_the_inside(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.bug = RuntimeError("secret detail")
    response = await client.post(path, json=body, headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "abc"
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


async def test_a_neighbour_goes_on_when_a_request_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.hold_after = 2
    good = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
    await engine.held.wait()
    bad = await client.post("/v1/completions", json=COMPLETION | {"temperature": -1})
    assert bad.status_code == 400
    engine.released.set()
    assert (await good).json()["choices"][0]["text"] == "hellohel"
