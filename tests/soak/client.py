"""One exchange as a client of any manners has it: reads all, reads slowly, hangs up at some moment.

Ends are counted, not assumed: an answer that never comes, comes twice or goes on after its last
event is seen in the record.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from tests.soak.record import Record, Wish

SLOW_READ_S = 0.05
"""Between two reads of a slow reader."""
DONE = "[DONE]"


class Client:
    """Asks one server. Many use it at once."""

    def __init__(self, http: httpx.AsyncClient, prompts: Sequence[str]) -> None:
        self._http = http
        self._prompts = prompts

    async def ask(self, id: str, wish: Wish, key: str) -> Record:
        """Never raises for what the server did: the record says it."""
        record = Record(id, wish, time.monotonic())
        request = self._http.build_request(
            "POST",
            "/v1/completions",
            json=body_of(wish, self._prompts),
            headers={"authorization": f"Bearer {key}", "x-request-id": id},
        )
        try:
            if wish.is_stream:
                await self._stream(request, record)
            else:
                await self._whole(request, record)
        except httpx.HTTPError as error:
            record.broke = f"{type(error).__name__}: {error}"
        record.ended_s = time.monotonic()
        return record

    async def _whole(self, request: httpx.Request, record: Record) -> None:
        try:
            async with asyncio.timeout(record.wish.leaves_after):
                response = await self._http.send(request)
        except TimeoutError:
            record.has_left = True
            return
        take_status(response, record)
        take_body(response.json(), record)

    async def _stream(self, request: httpx.Request, record: Record) -> None:
        wish = record.wish
        response = await self._http.send(request, stream=True)
        try:
            take_status(response, record)
            if response.status_code != 200:
                await response.aread()
                take_body(response.json(), record)
                return
            num_events = 0
            async for line in response.aiter_lines():
                if line:
                    take_event(line.removeprefix("data: "), record)
                    num_events += 1
                if wish.leaves_after is not None and num_events > wish.leaves_after:
                    record.has_left = True
                    return
                if wish.reads_slowly:
                    await asyncio.sleep(SLOW_READ_S)
        finally:
            await response.aclose()


def body_of(wish: Wish, prompts: Sequence[str]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": wish.name,
        "prompt": [prompts[number] for number in wish.prompts],
        "max_tokens": wish.max_tokens,
        "n": wish.n,
        "temperature": 0 if wish.is_greedy else 0.8,
        "ignore_eos": True,
        "priority": wish.priority,
        "stream": wish.is_stream,
    }
    if wish.depth != "none":
        body["lora_depth"] = wish.depth
    return body


def take_status(response: httpx.Response, record: Record) -> None:
    record.status = response.status_code
    record.retry_after = response.headers.get("retry-after")
    if response.headers.get("x-request-id") != record.id:
        record.broke = "the answer is somebody else's"


def take_body(body: Mapping[str, Any], record: Record) -> None:
    """A whole answer or a refusal."""
    record.num_ends += 1
    if "error" in body:
        record.code = str(body["error"]["code"])
        return
    record.depth = body["lora"]["depth"]
    record.texts = [choice["text"] for choice in body["choices"]]
    record.reasons = [choice["finish_reason"] for choice in body["choices"]]


def take_event(data: str, record: Record) -> None:
    """One event of a stream. The last is `[DONE]` or an error."""
    if record.num_ends:
        record.num_late += 1
    if data == DONE:
        record.num_ends += 1
        return
    event = json.loads(data)
    if "error" in event:
        record.num_ends += 1
        record.code = str(event["error"]["code"])
        return
    if event.get("lora"):
        record.depth = event["lora"]["depth"]
    if not record.texts:
        record.texts = [""] * record.wish.num_sequences
        record.reasons = [None] * record.wish.num_sequences
    for choice in event["choices"]:
        index = choice["index"]
        if record.reasons[index] is not None:
            record.num_late += 1
        record.texts[index] += choice["text"]
        record.reasons[index] = choice["finish_reason"]
