"""Steps of the real engine, each with its shape and its time.

The engine is driven on this thread, on a CPU, without HTTP, through situations that differ in one quantity
each or through whatever load the caller adds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from server.bench.capacity.step import StepShape, shape_of
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams
from server.engine.scheduled import Scheduled

_WARM_STEPS = 10
"""Decode steps of a new number of rows, until it is replayed as all later ones are."""

_NUM_STEPS = 8
"""Decode steps of one situation that are kept."""

_ids = count()


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step that was run: by the clock, and processor seconds of the thread that ran it."""

    shape: StepShape
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Decoding:
    """So many rows that each read about `context_len` keys, dealt over `num_adapters` (0: the base)."""

    num_rows: int
    context_len: int
    num_adapters: int
    depth: int | None = None

    @property
    def output_len(self) -> int:
        """Tokens of each row: until the last has begun, and all steps after that."""
        return self.num_rows + _WARM_STEPS + _NUM_STEPS + 2

    @property
    def prompt_len(self) -> int:
        """So that rows read about `context_len` keys in the middle."""
        return max(1, self.context_len - self.output_len // 2)

    @property
    def max_len(self) -> int:
        """Of its sequences."""
        return self.prompt_len + self.output_len


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of `prompt_len` tokens beside so many decoding rows, all of one adapter or the base."""

    prompt_len: int
    num_rows: int
    num_adapters: int
    depth: int | None = None

    @property
    def max_len(self) -> int:
        """Of its sequences."""
        return max(self.prompt_len + 2, 16 + self.output_len)

    @property
    def output_len(self) -> int:
        """Tokens of each decoding row: more than there can be steps."""
        return self.num_rows + self.prompt_len + 8


class StepTimer:
    """Runs an engine core's steps and notes them."""

    def __init__(self, core: EngineCore, seed: int) -> None:
        self._core = core
        self._random = Random(f"{seed}/tokens")
        self.shapes: list[StepShape] = []
        """What `step` ran last: one, but for a step that was tried again."""
        schedule = core.scheduler.schedule

        def note() -> list[Scheduled]:
            scheduled = schedule()
            self.shapes.append(shape_of(scheduled, core.info.num_layers))
            return scheduled

        core.scheduler.schedule = note  # type: ignore[method-assign]

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._core.info.vocab_size

    def step(self) -> TimedStep | None:
        """Run one; None where nothing was planned, a step was planned twice, or an adapter came in."""
        self.shapes.clear()
        num_loads = self._core.device_count().num_loads
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        self._core.step()
        wall_s, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
        is_plain = len(self.shapes) == 1 and self._core.device_count().num_loads == num_loads
        if not is_plain or not self.shapes[0].num_tokens:
            return None
        return TimedStep(self.shapes[0], wall_s, cpu_s)

    def add(self, prompt_len: int, output_len: int, adapter: str | None, depth: int | None) -> str:
        """Queue a request of random tokens; its id."""
        core = self._core
        name = core.info.name if adapter is None else adapter
        request = Request(
            f"timed-{next(_ids)}",
            tuple(self._random.randrange(core.info.vocab_size) for _ in range(prompt_len)),
            SamplingParams(output_len, temperature=0.0, ignore_eos=True),
            core.registry.select(name, None if adapter is None or depth is None else depth),
        )
        core.add(request)
        return request.id

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests, whether or not they have ended."""
        for request_id in request_ids:
            self._core.abort(request_id)

    def decode(self, situation: Decoding, adapters: Sequence[str]) -> list[TimedStep]:
        """Its steps, once every row decodes and steps of so many rows run as all later ones will."""
        names: Sequence[str | None] = adapters[: situation.num_adapters] or [None]
        ids = [
            self.add(
                situation.prompt_len, situation.output_len, names[row % len(names)], situation.depth
            )
            for row in range(situation.num_rows)
        ]
        kept: list[TimedStep] = []
        num_seen = 0
        while len(kept) < _NUM_STEPS:
            timed = self.step()
            if timed is not None and timed.shape.decode_rows == situation.num_rows:
                num_seen += 1
                if num_seen > _WARM_STEPS:
                    kept.append(timed)
        self.abort(ids)
        return kept

    def prefill(self, situation: Prefill, adapters: Sequence[str]) -> list[TimedStep]:
        """The steps in which one prompt is computed, chunk by chunk, beside rows that decode."""
        names: Sequence[str | None] = adapters[: situation.num_adapters] or [None]
        ids = [
            self.add(16, situation.output_len, names[row % len(names)], situation.depth)
            for row in range(situation.num_rows)
        ]
        decode_rows = 0 if situation.num_rows else -1
        while 0 <= decode_rows < situation.num_rows:
            timed = self.step()
            decode_rows = timed.shape.decode_rows if timed is not None else 0
        ids.append(self.add(situation.prompt_len, 2, names[0], situation.depth))
        kept: list[TimedStep] = []
        num_tokens = 0
        while num_tokens < situation.prompt_len:
            timed = self.step()
            num_tokens += sum(shape.prefill_tokens for shape in self.shapes)
            if timed is not None:
                kept.append(timed)
        self.abort(ids)
        return kept
