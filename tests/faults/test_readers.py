"""Clients that do not read, and clients that leave: what they hold, and for how long.

A real engine behind a real socket. The sockets' buffers are small, so that a client which does not read is
felt at once.
"""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from server.api import openai as openai_module
from server.api.app import create_app
from server.config import Settings
from server.engine import mailbox as mailbox_module
from server.engine.async_engine import AsyncEngine
from server.engine.mailbox import MAX_MESSAGES, Mailbox, merged
from server.engine.request import RequestOutput, SequenceDelta, TokenLogprobs
from server.serve import base_url, bind
from tests.api.asgi import Exchange
from tests.engine.test_async_engine import Gate
from tests.tiny import BASE_NAME, Tiny, make_core

pytestmark = pytest.mark.anyio

log = logging.getLogger(__name__)

LIMIT_S = 120
NUM_TOKENS = 240
BUFFER_BYTES = 4096
MAX_BYTES_EACH = 1_000_000
"""Of this process's memory, for a whole answer of `BODY`: 240 tokens with 21 scored alternatives each."""
SPARE_BYTES = 64_000_000
BODY: dict[str, Any] = {
    "model": BASE_NAME,
    "prompt": "and so on",
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
    "logprobs": 20,
}


@contextmanager
def started(tiny: Tiny) -> Iterator[AsyncEngine]:
    core = make_core(tiny, num_blocks=640, max_num_seqs=10, max_num_batched_tokens=64)
    engine = AsyncEngine(core, max_live_requests=2000)
    try:
        yield engine
    finally:
        engine.shutdown()


@asynccontextmanager
async def served(engine: AsyncEngine, **settings: Any) -> AsyncIterator[str]:
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    url = base_url(listener)
    app = create_app(Settings(**settings), engine)
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield url
    server.should_exit = True
    await task


class SlowReader:
    """Asks for a stream and reads none of it until it is told to."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self._request = head.encode() + content
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)

    async def ask(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, self._address)
        await loop.sock_sendall(self._socket, self._request)

    async def read(self) -> bytes:
        loop = asyncio.get_running_loop()
        parts = []
        while part := await loop.sock_recv(self._socket, 1 << 16):
            parts.append(part)
        self._socket.close()
        return b"".join(parts)

    def leave(self) -> None:
        self._socket.close()


def text_of(raw: bytes) -> tuple[str, int, bool]:
    """Text, number of tokens with their scores, and whether it ended well."""
    events = [line[6:] for line in raw.splitlines() if line.startswith(b"data: ")]
    choices = [json.loads(each)["choices"][0] for each in events if each != b"[DONE]"]
    scores = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    num_scored = sum(len(each["tokens"]) for each in scores)
    return "".join(c["text"] for c in choices), num_scored, events[-1] == b"[DONE]"


async def has_made(engine: AsyncEngine, num_tokens: int) -> None:
    while engine.stats().num_generated_tokens < num_tokens:
        await asyncio.sleep(0.02)
    assert engine.stats().num_generated_tokens == num_tokens


async def slow_readers(engine: AsyncEngine, num_readers: int, body: dict[str, Any]) -> list[int]:
    """How many outputs wait for each when all is made; then they read, and have all of it."""
    async with served(engine) as url:
        async with httpx.AsyncClient(timeout=LIMIT_S) as http:
            fast = await http.post(f"{url}/v1/completions", json=body)
        expected = text_of(fast.content)
        assert expected[1:] == (NUM_TOKENS * len(body["prompt"]), True)
        readers = [SlowReader(url, body) for _ in range(num_readers)]
        num_bytes = psutil.Process().memory_info().rss
        for reader in readers:
            await reader.ask()
        await has_made(engine, NUM_TOKENS * len(body["prompt"]) * (num_readers + 1))
        assert engine.stats().num_free_blocks == engine.stats().num_blocks, "they hold no blocks"
        waiting = [len(mailbox) for mailbox in engine._outbox.mailboxes.values()]
        num_more = psutil.Process().memory_info().rss - num_bytes
        log.info("%d readers: %.0f kB more for each", num_readers, num_more / num_readers / 1e3)
        assert num_more < num_readers * MAX_BYTES_EACH + SPARE_BYTES
        for reader in readers:
            assert text_of(await reader.read())[1:] == expected[1:]
        while engine._outbox.mailboxes:
            await asyncio.sleep(0.01)
        return waiting


@pytest.mark.parametrize(
    "num_readers", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
async def test_who_does_not_read_holds_a_bounded_number_of_outputs(
    tiny: Tiny, num_readers: int
) -> None:
    with started(tiny) as engine:
        body = BODY | {"prompt": ["and so on"]}
        waiting = await slow_readers(engine, num_readers, body)
        assert len(waiting) == num_readers
        assert 0 < max(waiting) <= MAX_MESSAGES


async def test_nor_do_the_prompts_of_one_body(tiny: Tiny) -> None:
    with started(tiny) as engine:
        waiting = await slow_readers(engine, 2, BODY | {"prompt": ["and so on", "and"]})
        assert len(waiting) == 4
        assert 0 < max(waiting) <= MAX_MESSAGES


async def test_control_without_merging_every_token_waits(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox_module, "MAX_MESSAGES", 10**9)
    with started(tiny) as engine:
        waiting = await slow_readers(engine, 2, BODY | {"prompt": ["and so on"]})
        assert max(waiting) > 2 * MAX_MESSAGES, "so many wait, each an object of its own"


async def test_a_slow_reader_that_leaves_is_forgotten(tiny: Tiny) -> None:
    with started(tiny) as engine:
        async with served(engine) as url:
            reader = SlowReader(url, BODY)
            await reader.ask()
            await has_made(engine, NUM_TOKENS)
            assert len(engine._outbox.mailboxes) == 1
            reader.leave()
            while engine._outbox.mailboxes:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_limited", [True, False])
async def test_who_never_reads_is_given_up_in_the_end(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, is_limited: bool
) -> None:
    """The control waits for as long as the client keeps its connection."""
    monkeypatch.setattr(openai_module, "LAST_READ_S", 0.0 if is_limited else 1000.0)
    with started(tiny) as engine:
        async with served(engine, request_timeout_s=2.0) as url:
            reader = SlowReader(url, BODY)
            await reader.ask()
            while not engine._outbox.mailboxes:
                await asyncio.sleep(0.01)
            if is_limited:
                while engine._outbox.mailboxes:
                    await asyncio.sleep(0.01)
            else:
                await asyncio.sleep(3.0)
                assert engine._outbox.mailboxes
            reader.leave()


# ---------------------------------------------------------------- what is put together


def output(token_id: int, *, index: int = 0, **facts: Any) -> RequestOutput:
    scores = (TokenLogprobs(token_id, -1.0, 1),)
    delta = SequenceDelta(index, f"<{token_id}>", (token_id,), scores, facts.pop("ends", None))
    return RequestOutput("x", (delta,), num_output_tokens=token_id, **facts)


async def test_a_mailbox_gives_all_in_order_whatever_waits() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    outputs = [output(token_id, index=token_id % 3) for token_id in range(1000)]
    taken = []
    for position, each in enumerate(outputs):
        mailbox.put(each)
        assert len(mailbox) <= MAX_MESSAGES
        if position in (3, 500, 501, 900):
            taken.append(await mailbox.get())
    while len(mailbox):
        taken.append(await mailbox.get())
    assert len(taken) < 200
    for index in range(3):
        deltas = [d for each in taken for d in each.deltas if d.index == index]
        expected = [t for t in range(1000) if t % 3 == index]
        assert [t for d in deltas for t in d.token_ids] == expected
        assert [s.token_id for d in deltas for s in d.logprobs] == expected
        assert "".join(d.text for d in deltas) == "".join(f"<{t}>" for t in expected)
    assert taken[-1].num_output_tokens == 999


async def test_who_waits_at_a_mailbox_is_woken() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    reading = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    assert not reading.done()
    mailbox.put(output(1))
    mailbox.put(output(2))
    assert (await reading).deltas[0].token_ids == (1,)
    reading = asyncio.create_task(mailbox.get())
    assert (await reading).deltas[0].token_ids == (2,)


def test_ends_scores_and_errors_survive_being_put_together() -> None:
    scores = (None, TokenLogprobs(1, -1.0, 1))
    whole = merged(
        [
            output(1, prompt_logprobs=scores),
            output(2, ends="stop"),
            output(3, index=1, finished=True),
        ]
    )
    assert whole.prompt_logprobs == scores
    assert [(d.index, d.token_ids, d.finish_reason) for d in whole.deltas] == [
        (0, (1, 2), "stop"),
        (1, (3,), None),
    ]
    assert whole.finished


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
async def test_a_client_that_leaves_frees_its_blocks_within_one_step(
    tiny: Tiny, stream: bool, num_steps: int
) -> None:
    """The step that runs when it leaves is its last; before the next its blocks are free."""
    core = make_core(tiny)
    gate = Gate(core)
    engine = AsyncEngine(core, max_live_requests=8)
    try:
        body = BODY | {"stream": stream, "n": 2}
        body["max_tokens"] = 100
        exchange = Exchange(create_app(Settings(), engine), "/v1/completions", body)
        if num_steps:
            gate.release(num_steps)
        while gate.num_waits < num_steps + 1:
            await asyncio.sleep(0)
        # The thread waits within a step, with the request in it or about to be.
        assert (core.blocks.num_free < core.blocks.num_blocks) == (num_steps > 0)
        exchange.hang_up()
        await exchange.done
        gate.release(1)
        while core.has_work or core._groups:
            await asyncio.sleep(0.001)
        assert core.blocks.num_free == core.blocks.num_blocks
        assert core.stats().num_steps == num_steps + 1
        assert core.stats().num_generated_tokens <= 2 * (num_steps + 1)
    finally:
        gate.release(10)
        await asyncio.to_thread(engine.shutdown)
