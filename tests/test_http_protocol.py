"""Heads are bounded in size and in time, connections in number, and everything else is as uvicorn has it."""

import asyncio
import json
import re
import socket
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import structlog
import uvicorn
from structlog.testing import LogCapture

from server import connections as connections_module
from server import http_protocol
from server.connections import Connections
from server.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol

pytestmark = pytest.mark.anyio

LEFT: list[str] = []
"""Requests that were told so."""
MOST = 20
MAX_SURPLUS = 5
BIG = 4_000_000
"""Times three bytes: more than the buffers of two sockets hold."""


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says how long the path and the body were; waits first, or says much, where the path asks for it."""
    size = 0
    while True:
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    if scope["path"] == "/left":
        while message["type"] != "http.disconnect":
            message = await receive()
        LEFT.append(scope["path"])
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    body = f"{len(scope['path'])} {size}".encode() * (BIG if scope["path"] == "/big" else 1)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop that `serve` runs on."""
    return "asyncio", {"use_uvloop": sys.platform != "win32"}


@pytest.fixture
def connections() -> Connections:
    return Connections(MOST, MAX_SURPLUS)


@pytest.fixture
async def port(connections: Connections) -> AsyncIterator[int]:
    http: Any = partial(BoundedHttpProtocol, connections=connections)
    config = uvicorn.Config(echo, port=0, log_config=None, http=http, ws="none", lifespan="off")
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    serving = asyncio.create_task(server.serve([listener]))
    yield listener.getsockname()[1]
    server.should_exit = True
    await serving


async def say(port: int, *parts: bytes) -> bytes:
    """Everything that comes back until the server closes, or is told to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


LAST = b"connection: close\r\n"
GET = b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.mark.parametrize("num_bytes", [10, MAX_HEAD_BYTES - 200])
async def test_a_head_within_the_limit_is_served(port: int, num_bytes: int) -> None:
    head = b"GET /abc HTTP/1.1\r\nhost: a\r\nx: " + b"y" * num_bytes + b"\r\n" + LAST
    assert (await say(port, head, b"\r\n")).endswith(b"\r\n\r\n4 0")


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nhost: a\r\n", *[b"x: " + b"y" * 10_000 + b"\r\n"] * 8],
        [b"GET / HTTP/1.1\r\nhost: a\r\n", *[b"x: " + b"y" * 10_000] * 8],
        [b"GET / HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 30_000, b"\r\n"],
        [b"GET /" + b"z" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: a\r\n\r\n"],
    ],
    ids=["one", "many in parts", "endless", "many", "path"],
)
async def test_a_head_over_the_limit_is_431(port: int, parts: list[bytes]) -> None:
    answer = await say(port, *parts)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("headers_too_large", "invalid_request_error")
    assert str(MAX_HEAD_BYTES) in error["message"]


async def test_a_body_is_no_head(port: int) -> None:
    body = b"b" * (3 * MAX_HEAD_BYTES)
    head = f"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n".encode() + LAST
    assert (await say(port, head + b"\r\n" + body)).endswith(f"1 {len(body)}".encode())
    parts = [body[i : i + 9999] for i in range(0, len(body), 9999)]
    assert (await say(port, head + b"\r\n", *parts)).endswith(f"1 {len(body)}".encode())


async def test_requests_may_follow_each_other_in_one_write(port: int) -> None:
    body = b"b" * MAX_HEAD_BYTES
    first = f"POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    second = b"GET /second HTTP/1.1\r\nhost: a\r\n" + LAST + b"\r\n"
    answer = await say(port, first + body + second[:20], second[20:])
    assert f"6 {len(body)}".encode() in answer
    assert answer.endswith(b"7 0")


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: a\r\n"])
async def test_a_head_that_does_not_end_closes_the_connection(
    port: int, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    assert await say(port, said) == b""


async def test_a_second_head_that_does_not_end_does_too(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    answer = await say(port, b"GET /one HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /two HT")
    assert answer.endswith(b"4 0")


async def test_an_answer_may_take_longer_than_a_head(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    head = b"GET /slow HTTP/1.1\r\nhost: a\r\n" + LAST + b"\r\n"
    assert (await say(port, head)).endswith(b"5 0")


async def test_what_is_no_http_is_400(port: int) -> None:
    head, _, body = (await say(port, b"\x00\x01\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


async def test_after_one_answer_what_is_no_http_is_400_too(port: int) -> None:
    answer = await say(port, GET, b"\x00\x01\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"400"]


async def test_a_broken_body_is_400(port: int) -> None:
    head = b"POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = await say(port, head, b"5\r\nhello\r\n", b"no length\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"400"]


@pytest.mark.parametrize(
    "more", [b"\x00\x01\r\n\r\n", b"GET /" + b"z" * (4 * MAX_HEAD_BYTES)], ids=["none", "endless"]
)
async def test_in_the_middle_of_an_answer_it_ends_the_connection(
    port: int, more: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever answers is told, and writes no more."""
    assert await say(port, GET.replace(b"/a", b"/slow"), more) == b""
    await asyncio.sleep(0.6)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("num_after", [0, 1, 3])
async def test_who_answers_is_told_that_the_client_left(port: int, num_after: int) -> None:
    """Also when the client has asked for more meanwhile: uvicorn tells the last of these alone."""
    LEFT.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET.replace(b"/a", b"/left") + GET * num_after)
    await asyncio.sleep(0.1)
    assert not LEFT
    writer.close()
    for _ in range(100):
        await asyncio.sleep(0.01)
    assert LEFT == ["/left"]


# ---------------------------------------------------------------- too many


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def crowd(port: int, connections: Connections) -> AsyncIterator[list[Stream]]:
    """As many as there may be, each in the middle of a head."""
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MOST)]
    for _, writer in streams:
        writer.write(GET[:10])
    while connections.num_open < MOST:
        await asyncio.sleep(0.01)
    yield streams
    for _, writer in streams:
        writer.close()


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    for header in (b"retry-after: 1", b"connection: close", b"x-content-type-options: nosniff"):
        assert header in head
    error: dict[str, Any] = json.loads(body)["error"]
    return error


async def test_one_connection_more_is_503_and_the_others_go_on(
    port: int, crowd: list[Stream], connections: Connections
) -> None:
    for num_refused in (1, 2):
        error = error_of(await say(port, GET))
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("overloaded_error", "too_many_connections")
        assert str(MOST) in error["message"]
        assert connections.num_refused == num_refused
    for reader, writer in crowd:
        writer.write(GET[10:])
        await reader.readuntil(b"\r\n\r\n2 0")


async def test_a_request_with_a_body_is_refused_in_words_too(
    port: int, crowd: list[Stream]
) -> None:
    head = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n"
    answer = await say(port, head, *[b"b" * 100_000] * 30)
    assert error_of(answer)["code"] == "too_many_connections"


async def test_when_one_leaves_there_is_room_again(
    port: int, crowd: list[Stream], connections: Connections
) -> None:
    crowd[0][1].close()
    while connections.num_open == MOST:
        await asyncio.sleep(0.01)
    assert (await say(port, GET[:-2] + LAST, b"\r\n")).endswith(b"2 0")
    assert connections.num_refused == 0


@pytest.mark.parametrize("path", [b"/health", b"/ready", b"/metrics?a=b"])
async def test_probes_are_answered_when_there_is_no_room(
    port: int, crowd: list[Stream], path: bytes
) -> None:
    """Once a connection, which is closed then."""
    probe = b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n\r\n"
    answer = await say(port, probe, probe)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert error_of(await say(port, probe.replace(path, b"/healthy")))


@pytest.mark.parametrize("said", [b"", b"GET /hea"])
async def test_who_comes_too_many_and_never_asks_is_told_and_closed(
    port: int, crowd: list[Stream], monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "LINGER_S", 0.2)
    assert error_of(await say(port, said))["code"] == "too_many_connections"


async def test_a_flood_is_closed_at_once(
    port: int, crowd: list[Stream], connections: Connections
) -> None:
    """The number of those who are listened to is bounded as well."""
    flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
    told = [await reader.read() for reader, _ in flood[MAX_SURPLUS:]]
    assert {error_of(answer)["code"] for answer in told} == {"too_many_connections"}
    while connections.num_open > MOST + MAX_SURPLUS:
        await asyncio.sleep(0.01)
    assert connections.num_open == MOST + MAX_SURPLUS
    for _, writer in flood:
        writer.close()


@pytest.mark.parametrize("is_looked_after", [True, False])
async def test_who_asks_and_never_reads_is_let_go(
    port: int, connections: Connections, monkeypatch: pytest.MonkeyPatch, is_looked_after: bool
) -> None:
    """The control: uvicorn closes such a connection, and waits for its reader for ever."""
    monkeypatch.setattr(connections_module, "FLUSH_S", 0.2)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET /big HTTP/1.1\r\nhost: a\r\n" + LAST + b"\r\n")
        while not any(each.transport.is_closing() for each in connections._served):
            await asyncio.sleep(0.01)
        for _ in range(10):
            if is_looked_after:
                connections.look_after()
            await asyncio.sleep(0.1)
        assert connections.num_open == (0 if is_looked_after else 1)


async def test_refusals_are_told_once_for_many(
    port: int, crowd: list[Stream], connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await say(port, GET)
    told = LogCapture()
    monkeypatch.setattr(connections_module, "log", structlog.wrap_logger(None, processors=[told]))
    connections.look_after()
    connections.look_after()
    assert [(line["log_level"], line["num_refused"]) for line in told.entries] == [("warning", 3)]
