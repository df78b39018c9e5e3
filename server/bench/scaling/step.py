"""What a decode step takes beside its own matrix products, and what LoRA adds to it, by depth.

The products of one step are recorded as the model calls them (same weights, same rows, same numbers of
threads) and run again with nothing between them: no step can be faster. Attention's two products run on
keys and values that were copied together before. Whole engine steps, with scheduling, sampling and
detokenising, are timed in turn with them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from server.bench.measure import Spread
from server.config import Settings
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams
from server.loading import ReportProgress
from server.model.replay.tape import noting

_NUM_STEPS = 24
"""Decode steps of one timing, of which the median counts."""

NUM_FIRST_STEPS = 8
"""Of a number of rows, until they run as all later ones will."""

_PRODUCTS = ("_linear_pointwise", "linear", "mm", "matmul", "addmm", "bmm", "baddbmm")
"""Operators that multiply matrices, by the names of their overload packets."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Decode steps of so many rows; seconds."""

    num_rows: int
    context_len: int
    linears: Spread
    """Products with weights, of a base step."""
    attention: Spread
    """Products with keys and with values."""
    base: Spread
    """Whole steps without an adapter."""
    at_depth: dict[int, Spread]
    """Whole steps of rows that are spread over all adapters."""

    @property
    def over_products(self) -> Spread:
        """Base step over the sum of its products, of each repeat."""
        return Spread.of(
            [
                step / (linears + attention)
                for step, linears, attention in zip(
                    self.base.each, self.linears.each, self.attention.each, strict=True
                )
            ]
        )

    def tax(self, depth: int) -> Spread:
        """Share of the base model's speed that LoRA costs at this depth, of each repeat."""
        pairs = zip(self.base.each, self.at_depth[depth].each, strict=True)
        return Spread.of([1 - base / step for base, step in pairs])


class ProductRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps each product that is called while it is entered, to be called again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []
        self._is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operator."""
        given = kwargs or {}
        if not self._is_inside and func.overloadpacket.__name__ in _PRODUCTS:
            self.calls.append(lambda: func(*args, **given))
        return func(*args, **given)

    def call(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """See `tape.CallNoter`: a packed product, by whatever multiplies it."""
        self.calls.append(lambda: function(*args))
        self._is_inside = True
        try:
            return function(*args)
        finally:
            self._is_inside = False


def measure_steps(
    settings: Settings,
    rows: Sequence[int],
    depths: Sequence[int],
    *,
    prompt_len: int,
    repeat: int,
    progress: ReportProgress,
) -> list[StepTimes]:
    """Load the model without a thread of its own, and time steps of each number of rows.

    settings: without a prefix cache, and with blocks for the most rows, each of `max_len` tokens.
    """
    core = EngineCore.from_settings(settings)
    try:
        for name, path in settings.adapter_paths().items():
            core.registry.load(name, path)
        adapters = list(settings.adapter)
        return [
            _measure(core, adapters, num_rows, depths, prompt_len, repeat, progress)
            for num_rows in rows
        ]
    finally:
        core.close()


def max_len(num_rows: int, prompt_len: int) -> int:
    """Of a sequence that is timed; the first may decode while the others' prompts are still computed."""
    return prompt_len + NUM_FIRST_STEPS + _NUM_STEPS + num_rows + 4


def _measure(
    core: EngineCore,
    adapters: Sequence[str],
    num_rows: int,
    depths: Sequence[int],
    prompt_len: int,
    repeat: int,
    progress: ReportProgress,
) -> StepTimes:
    middle = prompt_len + _NUM_STEPS // 2
    with decoding(core, num_rows, [core.info.name], None, prompt_len):
        for _ in range(NUM_FIRST_STEPS):
            core.step()
        replay, core.runner.replay = core.runner.replay, None  # it calls products past the recorder
        recorder = ProductRecorder()
        with recorder, noting(recorder):
            core.step()
        core.runner.replay = replay
    linears = recorder.calls
    attention = _attention_products(core, num_rows, middle)
    times: dict[Any, list[float]] = {key: [] for key in ("linears", "attention", None, *depths)}
    for done in range(-1, repeat):  # the first round warms up
        progress(f"{num_rows} rows", max(done, 0), repeat)
        for key, own in times.items():
            if key == "linears":
                seconds = _products_s(linears)
            elif key == "attention":
                seconds = _products_s(attention)
            else:
                names = [core.info.name] if key is None else adapters
                with decoding(core, num_rows, names, key, prompt_len):
                    seconds = median_s(core.step)
            if done >= 0:
                own.append(seconds)
    progress(f"{num_rows} rows", repeat, repeat)
    return StepTimes(
        num_rows,
        middle,
        Spread.of(times["linears"]),
        Spread.of(times["attention"]),
        Spread.of(times[None]),
        {depth: Spread.of(times[depth]) for depth in depths},
    )


@contextmanager
def decoding(
    core: EngineCore, num_rows: int, names: Sequence[str], depth: int | None, prompt_len: int
) -> Iterator[None]:
    """So many sequences past their prompts, while the block lasts."""
    ids = [f"row-{row}" for row in range(num_rows)]
    num_before = core.stats().num_generated_tokens
    for row, request_id in enumerate(ids):
        core.add(
            Request(
                request_id,
                tuple((row + place) % core.info.vocab_size for place in range(prompt_len)),
                SamplingParams(
                    max_tokens=max_len(num_rows, prompt_len) - prompt_len,
                    temperature=0,
                    ignore_eos=True,
                ),
                core.registry.select(names[row % len(names)], depth),
            )
        )
    try:
        while core.stats().num_generated_tokens < num_before + num_rows:
            core.step()
        yield
    finally:
        for request_id in ids:
            core.abort(request_id)


def _attention_products(
    core: EngineCore, num_rows: int, context_len: int
) -> list[Callable[[], object]]:
    """Query times keys and weights times values of each layer, each over tensors of its own."""
    calls: list[Callable[[], object]] = []
    for pool in (core.runner.cache.keys, core.runner.cache.values):
        for layer in pool:
            _, _, num_kv_heads, width = layer.shape
            held = layer.new_ones(num_rows * num_kv_heads, width, context_len)
            group = core.runner.model.config.num_attention_heads // num_kv_heads
            calls.append(_product(layer.new_ones(len(held), group, width), held))
    return calls


def _product(left: Tensor, right: Tensor) -> Callable[[], object]:
    return lambda: torch.bmm(left, right)


@torch.inference_mode()
def _products_s(calls: Sequence[Callable[[], object]]) -> float:
    return median_s(lambda: [call() for call in calls])


def median_s(run: Callable[[], object]) -> float:
    """Seconds of one of many runs."""
    seconds = []
    for _ in range(_NUM_STEPS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return median(seconds)
