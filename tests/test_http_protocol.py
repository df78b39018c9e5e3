"""The head of a request is bounded in size and in time, and everything else is as uvicorn has it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from server import http_protocol
from server.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol

pytestmark = pytest.mark.anyio


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says how long the path and the body were; waits first where the path asks for it."""
    size = 0
    while True:
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    body = f"{len(scope['path'])} {size}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(
        echo, port=0, log_config=None, http=BoundedHttpProtocol, ws="none", lifespan="off"
    )
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
    assert (await say(port, b"\x00\x01\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
