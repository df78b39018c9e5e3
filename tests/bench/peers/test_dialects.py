"""What goes over the wire to each kind of server, and what is read back."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from server.bench.load import drive
from server.bench.mix import Choice
from server.bench.workload import WorkItem
from tests.bench.peers.client import PeerClient
from tests.bench.peers.dialects import LlamaDialect, OpenAIDialect, TransformersDialect, words

ITEM = WorkItem((5, 6), 2, Choice("a1"))
BASE = WorkItem((7, 8), 2, Choice())


def test_llama_is_told_every_scale_each_time() -> None:
    dialect = LlamaDialect(("a0", "a1"))
    assert dialect.body(ITEM)["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    assert dialect.body(BASE)["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]


def test_only_what_names_an_adapter_gets_a_depth() -> None:
    dialect = OpenAIDialect("base", {"lora_depth": "full"})
    assert (dialect.body(ITEM)["model"], dialect.body(ITEM)["lora_depth"]) == ("a1", "full")
    assert dialect.body(BASE)["model"] == "base"
    assert "lora_depth" not in dialect.body(BASE)


def test_transformers_serve_gets_words_and_no_field_that_it_refuses() -> None:
    body = TransformersDialect("base").body(BASE)
    assert body["prompt"] == "w7 w8"
    assert set(body) == {"model", "prompt", "max_tokens", "temperature", "stream"}


def test_a_word_that_is_no_token_equals_none() -> None:
    assert words(" w17 w4") == (17, 4)
    assert words("w17 hello w") == (17, -1, -1)


def stream(*events: object) -> web.Response:
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    return web.Response(text=text)


async def ask(answer: web.Response) -> tuple[str | None, int, list[int]]:
    async def handle(_: web.Request) -> web.Response:
        return answer

    return await ask_handler(handle)


async def ask_handler(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> tuple[str | None, int, list[int]]:
    dialect = OpenAIDialect("base")
    app = web.Application()
    app.router.add_post(dialect.path, handle)
    async with TestServer(app) as server, PeerClient(str(server.make_url("/")), dialect) as client:
        result = await drive(client, [ITEM], 1)
        (timing,) = result.timings
        return timing.error, timing.num_output_tokens, client.completions[ITEM.prompt]


def run(answer: web.Response) -> tuple[str | None, int, list[int]]:
    return asyncio.run(ask(answer))


@pytest.mark.parametrize(("usage", "error"), [(2, None), (1, "1 tokens came, 2 were asked for")])
def test_tokens_are_counted_from_usage(usage: int, error: str | None) -> None:
    events = [
        {"choices": [{"text": "w1 w2"}]},
        {"choices": [], "usage": {"completion_tokens": usage}},
    ]
    found = run(stream(*events))
    assert found == (error, usage, [1, 2])


@pytest.mark.parametrize("size", [1, 3, 20, 1000])
def test_messages_may_be_cut_anywhere(size: int) -> None:
    events = [{"choices": [{"text": "w1"}]}, {"choices": [{"text": " w2"}]}]
    text = stream(*events).body
    assert isinstance(text, bytes)
    text = text.replace(b"\n\n", b"\r\n\r\n: a comment\n\n", 1)

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(text), size):
            await response.write(text[start : start + size])
            await asyncio.sleep(0)
        return response

    assert asyncio.run(ask_handler(handle)) == (None, 2, [1, 2])


def test_an_error_in_a_stream_fails_the_request() -> None:
    error, _, tokens = run(stream({"choices": [{"text": "w1"}]}, {"error": "out of memory"}))
    assert error == "out of memory"
    assert tokens == [1]


def test_a_refusal_fails_the_request() -> None:
    error, _, _ = run(web.Response(status=422, text="no such field"))
    assert error == "422: no such field"
