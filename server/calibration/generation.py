"""Greedy texts of many samples at many depths, as ordinary requests of the lowest priority.

They share steps with everybody else's requests, so no more than a share of the places is asked for
while others are served. Knows no metric: `pipeline` asks for texts and scores them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from boundary.dataset import Sample
from boundary.sample import usual_max_tokens
from server.engine.protocol import Engine
from server.engine.request import AdapterRef, LoraSelection, Request, SamplingParams
from server.errors import BadRequest, GenerationError, QueueFull

LOWEST_PRIORITY = 1 << 31
"""One more than a client can ask for."""

Place = tuple[int, int]
"""A sample's index and a depth."""


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How texts are generated: for metrics of text, and for the samples that a report shows.

    pattern: for the metric `regex_answer` alone.
    max_tokens: of each text; None is the longest reference's and a quarter more, as the context has
        room.
    num_shown: samples whose texts at base, chosen and full depth are kept.
    max_num_seqs: sequences of one step, as the engine was told.
    busy_share, idle_share: of these, how many are ours at once, at least one: while others are
        served, and while nobody is.
    """

    pattern: str | None = None
    max_tokens: int | None = None
    num_shown: int = 3
    max_num_seqs: int = 64
    busy_share: float = 0.1
    idle_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Text:
    """What the model wrote.

    is_cut: it reached `max_tokens` before its own end.
    """

    text: str
    num_tokens: int
    is_cut: bool


def texts_max_tokens(
    samples: Sequence[Sample], options: GenerationOptions, max_model_len: int
) -> int:
    """How long a text may become, the same for all samples where their context has room.

    Raises BadRequest if it was asked for and a sample's prompt leaves no room for it.
    """
    if options.max_tokens is None:
        return usual_max_tokens(samples)
    for index, sample in enumerate(samples):
        room = max_model_len - len(sample.prompt_token_ids)
        if options.max_tokens > room:
            raise BadRequest(
                f"'max_tokens' is {options.max_tokens}, but the prompt of line {index + 1} leaves "
                f"room for {room} in the context of {max_model_len}",
                param="max_tokens",
            )
    return options.max_tokens


async def generate_texts(
    engine: Engine,
    adapter: AdapterRef,
    samples: Sequence[Sample],
    places: Sequence[Place],
    max_tokens: int,
    options: GenerationOptions,
    on_progress: Callable[[int], None],
) -> dict[Place, Text]:
    """The text of each place; `on_progress` is told how many are done.

    Ends with the first request that fails, and cancelled with all that is running aborted; then
    nothing is left. Raises what the engine raises.
    """
    name = f"calibration-{uuid4().hex}"
    waiting = deque(places)
    running: dict[asyncio.Task[Text], Place] = {}
    texts: dict[Place, Text] = {}

    def limit() -> int:
        stats = engine.stats()
        is_busy = stats.num_running + stats.num_waiting > len(running)
        share = options.busy_share if is_busy else options.idle_share
        return max(1, int(options.max_num_seqs * share))

    try:
        while waiting or running:
            while waiting and len(running) < limit():
                index, depth = place = waiting.popleft()
                prompt = samples[index].prompt_token_ids
                room = engine.info.max_model_len - len(prompt)
                request = Request(
                    id=f"{name}-{index}-{depth}",
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(max_tokens=min(max_tokens, room), temperature=0),
                    lora=LoraSelection(adapter, depth, engine.info.num_layers, "request"),
                    priority=LOWEST_PRIORITY,
                    arrival_s=time.monotonic(),
                )
                running[asyncio.create_task(_text(engine, request))] = place
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                texts[running.pop(task)] = task.result()
            on_progress(len(texts))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return texts


async def _text(engine: Engine, request: Request) -> Text:
    while True:
        try:
            return await _written(engine, request)
        except QueueFull as error:  # clients come first
            await asyncio.sleep(error.retry_after_s)


async def _written(engine: Engine, request: Request) -> Text:
    text, num_tokens, is_cut = "", 0, False
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise output.error
            for delta in output.deltas:
                if delta.finish_reason in ("abort", "error"):
                    raise GenerationError("a text of the calibration was aborted by the server")
                text += delta.text
                num_tokens += len(delta.token_ids)
                is_cut = is_cut or delta.finish_reason == "length"
    return Text(text, num_tokens, is_cut)
