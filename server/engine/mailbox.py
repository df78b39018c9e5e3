"""What one stream's reader has not taken yet, in bounded memory.

The engine never waits for a reader. What a slow one leaves is kept, and put together once there is much
of it: then it is one message, of as many characters and token ids as it says.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from server.engine.request import RequestOutput, SequenceDelta, joined

MAX_MESSAGES = 64
"""Outputs that wait apart. Merging at every output would copy a long text again for each token."""


class Mailbox:
    """One stream's outputs on its event loop. Only that loop's thread may touch it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._outputs: deque[RequestOutput] = deque()
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._outputs)

    def put(self, output: RequestOutput) -> None:
        """Leave an output for the reader."""
        self._outputs.append(output)
        if len(self._outputs) > MAX_MESSAGES:
            self._outputs = deque([merged(self._outputs)])
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> RequestOutput:
        """The next output, once there is one."""
        while not self._outputs:
            self._reader = self.loop.create_future()
            await self._reader
        return self._outputs.popleft()


def merged(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """One request's outputs in their order, at least one, as if they had come at once."""
    deltas: dict[int, list[SequenceDelta]] = {}
    scores = None
    for output in outputs:
        scores = output.prompt_logprobs if scores is None else scores
        for delta in output.deltas:
            deltas.setdefault(delta.index, []).append(delta)
    return replace(
        output,
        deltas=tuple(joined(of_sequence) for of_sequence in deltas.values()),
        prompt_logprobs=scores,
    )
