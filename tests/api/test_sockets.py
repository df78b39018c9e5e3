"""The application under uvicorn on a real socket: what only a connection shows."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from openai import AsyncOpenAI, OpenAI

from server.api.app import create_app
from server.config import Settings
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 8}


@pytest.fixture
async def port(engine: FakeEngine, settings: Settings) -> AsyncIterator[int]:
    config = uvicorn.Config(create_app(settings, engine), port=0, log_config=None, ws="none")
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    serving = asyncio.create_task(server.serve([listener]))
    yield listener.getsockname()[1]
    server.should_exit = True
    await serving


async def send(
    port: int, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 3])
async def test_a_closed_connection_aborts(
    engine: FakeEngine, port: int, stream: bool, hold_after: int
) -> None:
    engine.hold_after = hold_after
    _, writer = await send(port, BODY | {"stream": stream})
    await engine.held.wait()
    writer.close()
    await engine.ended.wait()
    assert engine.aborted == [engine.requests[0].id]


async def test_the_first_tokens_arrive_while_the_rest_is_made(
    engine: FakeEngine, port: int
) -> None:
    engine.hold_after = 3
    client = AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1")
    async with client:
        stream = await client.completions.create(**BODY, stream=True)
        texts = []
        async for chunk in stream:
            texts.append(chunk.choices[0].text)
            if len(texts) == 3:
                assert engine.requests
                engine.released.set()
        assert "".join(texts) == "hellohel"


async def test_the_synchronous_client(engine: FakeEngine, port: int) -> None:
    def ask() -> str:
        with OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1") as client:
            return client.completions.create(**BODY).choices[0].text

    assert await asyncio.to_thread(ask) == "hellohel"


async def test_a_chunked_body_over_the_limit_is_413(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n" * 1
    )
    writer.write(b"1\r\n \r\n")
    status = await reader.readline()
    assert b" 413 " in status
    writer.close()


async def test_a_long_prompt_does_not_stop_the_loop(engine: FakeEngine, settings: Settings) -> None:
    """The loop turns while a text is tokenized, which takes the worker thread much longer."""
    from server.api.prompts import MAX_INLINE_CHARS, encode

    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    turning = asyncio.create_task(turn())
    text = "héllo wörld " * 20_000
    assert len(text) > MAX_INLINE_CHARS
    token_ids = await encode(engine, text, add_special_tokens=True)
    turning.cancel()
    assert len(token_ids) > len(text)
    assert turns > 3
