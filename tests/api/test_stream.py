"""A stream's chunks are what their models are, and its time is over once, however often it is waited."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from server.api import text_frame
from server.api.deadline import Deadline
from server.api.responses import TextChoice, TextCompletion
from server.api.text_frame import TextFrame
from server.config import Settings
from tests.api.conftest import MakeClient
from tests.api.fake_engine import FakeEngine
from tests.api.test_ends import both_routes

pytestmark = pytest.mark.anyio

AWKWARD = 'a "b" \\ \n\r\t\b\f \x00\x1f\x7f é 中 \U0001f600 \u2028 </script> \ufffd'


class EveryModel:
    """In place of a frame: makes and writes the model of each text."""

    def __init__(self, model_of: Callable[[str], BaseModel]) -> None:
        self._model_of = model_of

    def around(self, text: str) -> bytes:
        return self._model_of(text).model_dump_json(exclude_unset=True).encode()


def completion(text: str) -> TextCompletion:
    choice = TextChoice(index=1, text=text, logprobs=None, finish_reason=None, stop_reason=None)
    return TextCompletion(
        id="cmpl-1", object="text_completion", created=1, model='a "model"', choices=[choice]
    )


@pytest.mark.parametrize("text", [AWKWARD, "", " ", '"', "w17"])
def test_a_frame_says_what_its_model_says(text: str) -> None:
    made_of = []

    def model_of(mark: str) -> BaseModel:
        made_of.append(mark)
        return completion(mark)

    frame = TextFrame(model_of)
    assert frame.around(text) == EveryModel(completion).around(text)
    assert frame.around(text + "!") != EveryModel(completion).around(text)
    assert len(made_of) == 1


@both_routes
@pytest.mark.parametrize("extra", [{}, {"n": 2, "stream_options": {"include_usage": True}}])
async def test_framed_streams_are_those_of_models(
    make_client: MakeClient,
    engine: FakeEngine,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    engine.reply = lambda request, index: f"{index} {AWKWARD}"
    client = make_client(engine, settings)
    body = body | extra | {"stream": True, "max_tokens": 200}

    async def streamed() -> str:
        response = await client.post(path, json=body)
        assert response.status_code == 200
        named = re.sub(r'"id":"[^"]*"', '"id":""', response.text)
        return re.sub(r'"created":\d+', '"created":0', named)

    framed = await streamed()
    monkeypatch.setattr(text_frame, "TextFrame", EveryModel)
    assert await streamed() == framed
    assert framed.count("data: ") > 20


async def test_a_deadline_ends_the_wait_it_comes_in_and_those_after_it() -> None:
    deadline = Deadline(asyncio.get_running_loop().time() + 0.01)
    for _ in range(3):  # the same one, as long as it has not come
        with deadline:
            await asyncio.sleep(0)
    with pytest.raises(TimeoutError), deadline:
        await asyncio.sleep(30)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError), deadline:
        pytest.fail("it has come")


async def test_a_deadline_between_waits_cancels_nothing() -> None:
    deadline = Deadline(asyncio.get_running_loop().time() + 0.01)
    with deadline:
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    with pytest.raises(TimeoutError), deadline:
        pytest.fail("it has come")


async def test_who_is_cancelled_by_others_is_told_so() -> None:
    loop = asyncio.get_running_loop()

    async def wait() -> None:
        with Deadline(loop.time() + 0.01):
            await asyncio.sleep(30)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    loop.call_at(loop.time() + 0.01, task.cancel)
    time.sleep(0.05)  # now both are due in one turn of the loop
    await asyncio.wait((task,))
    assert task.cancelled()


async def test_a_closed_deadline_does_not_come() -> None:
    deadline = Deadline(asyncio.get_running_loop().time() + 0.01)
    with deadline:
        deadline.close()
        await asyncio.sleep(0.05)
