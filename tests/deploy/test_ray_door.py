"""What runs in Serve's proxies and around a replica's application, which needs no Ray itself."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.types import Message

RAY = Path(__file__).parents[2] / "deploy" / "ray"
SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
START = {"type": "http.response.start", "status": 200, "headers": []}

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    monkeypatch.syspath_prepend(str(RAY))
    yield lambda name: import_module(f"fathom_ray.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fathom_ray"]:
        del sys.modules[name]


class Application:
    """Reads the whole body, remembers what it was given, and answers with `messages`."""

    def __init__(self, *messages: Message) -> None:
        self.messages = messages
        self.body = b""
        self.hints: list[bytes] = []
        self.was_asked = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.was_asked = True
        self.hints = [v for k, v in scope["headers"] if k == b"serve-multiplexed-model-id"]
        while (message := await receive())["type"] == "http.request":
            self.body += message["body"]
            if not message["more_body"]:
                break
        for answer in self.messages:
            await send(answer)


def asked(middleware: Any, pieces: list[bytes], **scope: Any) -> list[Message]:
    """What the client of `middleware` is sent."""
    sent: list[Message] = []
    left = list(pieces)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(middleware(SCOPE | scope, receive, send))
    return sent


@pytest.mark.parametrize(
    ("model", "hint"),
    [("a", [b"a"]), ("a@12", [b"a"]), ("a@auto", [b"a"]), ("ä", ["ä".encode()]), ("", []), (5, [])],
)
def test_a_request_says_which_adapter_it_is_for(load: Load, model: Any, hint: list[bytes]) -> None:
    application = Application()
    body = json.dumps({"prompt": "x", "model": model}).encode()
    asked(load("hint").HintMiddleware(application), [body[:9], body[9:]])
    assert (application.hints, application.body) == (hint, body)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "a\\nb"}'])
def test_a_body_without_a_name_passes_as_it_is(load: Load, body: bytes) -> None:
    application = Application()
    asked(load("hint").HintMiddleware(application), [body])
    assert (application.hints, application.body) == ([], body)


def test_what_is_large_late_or_said_already_is_not_looked_at(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = load("hint")
    body = b'{"model": "a", "prompt": "' + b"x" * hint.MAX_HINT_BYTES + b'"}'
    application = Application()
    asked(hint.HintMiddleware(application), [body[:100], body[100:-1], body[-1:]])
    assert (application.hints, application.body) == ([], body)
    application = Application()
    own = [(b"serve_multiplexed_model_id", b"b")]
    asked(hint.HintMiddleware(application), [b'{"model": "a"}'], headers=own)
    assert application.hints == []
    monkeypatch.setattr(hint, "PATIENCE_S", 0.01)

    async def late() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b'{"model": "a"}', "more_body": False}

    application = Application()
    asyncio.run(hint.HintMiddleware(application)(SCOPE, late, None))
    assert (application.hints, application.body) == ([], b'{"model": "a"}')


def test_a_client_is_told_that_its_replica_was_lost(load: Load) -> None:
    guard = load("lost_replica").LostReplicaMiddleware
    start, body = asked(guard(Application()), [b""])
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (503, "replica_lost")
    assert (b"retry-after", b"1") in start["headers"]
    events = START | {"headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
    piece = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
    *_, last = asked(guard(Application(events, piece)), [b""])
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "replica_lost"
    assert not last.get("more_body", False)
    # What ended, or is no stream of events, is left alone.
    ended = [events, piece, piece | {"more_body": False}]
    assert asked(guard(Application(*ended)), [b""]) == ended
    assert asked(guard(Application(START, piece)), [b""]) == [START, piece]


def test_no_replica_loads_what_the_others_would_not_have(load: Load) -> None:
    guard = load("one_replica").OneReplicaMiddleware
    for method, path, is_refused in (
        ("POST", "/v1/load_lora_adapter", True),
        ("POST", "/v1/unload_lora_adapter", True),
        ("PUT", "/admin/adapters/a", True),
        ("DELETE", "/admin/adapters/a", True),
        ("GET", "/admin/adapters/a", False),
        ("PUT", "/admin/adapters/a/boundary", False),
        ("POST", "/admin/adapters/a/recalibrate", False),
        ("POST", "/v1/completions", False),
    ):
        application = Application()
        sent = asked(guard(application), [b"{}"], method=method, path=path)
        assert application.was_asked is not is_refused, path
        assert [m["status"] for m in sent if "status" in m] == [409] * is_refused


def test_a_response_names_its_replica(load: Load) -> None:
    named = load("named_replica").NamedReplicaMiddleware
    (start,) = asked(named(Application(dict(START, headers=[])), "abc"), [b""])
    assert (b"x-fathom-replica", b"abc") in start["headers"]
