"""What is sent to a server and how its streams are read, over a transport that is a function."""

import asyncio
import json

import httpx2
import pytest

from server.bench.load import LoadResult, drive
from server.bench.mix import Choice
from server.bench.over_http import HttpClient, ServedModels
from server.bench.workload import WorkItem
from server.config import ConfigError

ITEM = WorkItem((5, 6), 2, Choice("a0", 3))


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


STREAM = (
    event(choices=[{"text": "x"}], usage=None)
    + event(choices=[{"text": "y"}])
    + event(choices=[{"text": "", "finish_reason": "length"}])
    + event(
        choices=[],
        usage={"completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
    )
    + "data: [DONE]\n\n"
)


def complete(status: int, text: str, item: WorkItem = ITEM) -> tuple[LoadResult, dict[str, object]]:
    sent: dict[str, object] = {}

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.update(json.loads(request.content), key=request.headers.get("Authorization"))
        return httpx2.Response(status, text=text)

    async def run() -> LoadResult:
        transport = httpx2.MockTransport(answer)
        async with HttpClient("http://x", "base", api_key="k", transport=transport) as client:
            return await drive(client, [item], 1)

    return asyncio.run(run()), sent


def test_a_stream_is_timed_by_its_text_and_counted_by_its_usage() -> None:
    result, sent = complete(200, STREAM)
    (timing,) = result.timings
    assert (timing.error, timing.num_output_tokens, timing.num_cached_tokens) == (None, 2, 1)
    assert len(timing.piece_s) == 2
    assert result.counters is None
    assert sent["model"] == "a0"
    assert sent["lora_depth"] == 3
    assert sent["prompt"] == [5, 6]
    assert sent["max_tokens"] == 2
    assert sent["ignore_eos"] is True
    assert sent["key"] == "Bearer k"


def test_the_base_model_is_asked_for_by_its_name_and_without_a_depth() -> None:
    _, sent = complete(200, STREAM, WorkItem((5,), 2, Choice()))
    assert sent["model"] == "base"
    assert "lora_depth" not in sent


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (404, '{"error": {"message": "no such adapter"}}', "no such adapter"),
        (502, "bad gateway", "bad gateway"),
        (200, event(error={"message": "it broke"}), "it broke"),
        (200, event(choices=[{"text": "x"}]), "1 tokens came, 2 were asked for"),
    ],
)
def test_failures_carry_the_servers_words(status: int, text: str, error: str) -> None:
    assert complete(status, text)[0].timings[0].error == error


def models(text: str) -> ServedModels:
    async def run() -> ServedModels:
        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, text=text))
        async with HttpClient("http://x", transport=transport) as client:
            return await client.models()

    return asyncio.run(run())


def test_a_server_says_what_it_serves() -> None:
    cards = [{"id": "m", "max_model_len": 64}, {"id": "a0"}, {"id": "a1"}]
    assert models(json.dumps({"data": cards})) == ServedModels("m", ("a0", "a1"), 64)


@pytest.mark.parametrize("text", ["hello", "{}", '{"data": []}', '{"data": [{"id": "m"}]}'])
def test_what_is_no_fathom_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        models(text)
