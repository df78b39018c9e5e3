"""Steps of one model in its dtype and with int8 weights, in turn: what quantization gives and costs.

Both engines are in this process, so a noisy minute hits both. Steps are whole ones, as in `step`: decode
steps of so many rows, of the base model and of rows spread over all adapters, and one prompt's prefill.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from server.bench.measure import Spread
from server.bench.memory import weight_bytes
from server.bench.scaling.step import NUM_FIRST_STEPS, decoding, median_s
from server.config import Settings
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams
from server.loading import ReportProgress

KINDS = ("none", "int8")
_NUM_PROMPTS = 3
"""Prefills of one timing, of which the median counts."""


@dataclass(frozen=True, slots=True)
class QuantizedTimes:
    """One kind of step; seconds by quantization."""

    what: str
    seconds: dict[str, Spread]

    @property
    def speed(self) -> Spread:
        """Steps with int8 in the time of one without, of each repeat."""
        pairs = zip(*(self.seconds[kind].each for kind in KINDS), strict=True)
        return Spread.of([plain / quantized for plain, quantized in pairs])


@dataclass(frozen=True, slots=True)
class QuantizedFindings:
    """Everything that was measured."""

    base_bytes: dict[str, int]
    """Of the base model's weights, by quantization."""
    times: list[QuantizedTimes]


def measure_quantized(
    settings: Settings,
    rows: Sequence[int],
    *,
    prompt_len: int,
    prefill_len: int,
    repeat: int,
    progress: ReportProgress,
) -> QuantizedFindings:
    """Load both, and time what each does in turn.

    settings: without a prefix cache, and with blocks for the most rows and for the prefill.
    """
    adapters = list(settings.adapter)
    base_bytes = {
        kind: weight_bytes(settings.model_copy(update={"quantization": kind, "adapter": {}}))
        for kind in KINDS
    }
    cases: dict[str, Callable[[EngineCore], float]] = {}
    for num_rows in rows:
        for name in ("base", "adapters"):
            cases[f"{num_rows} rows, {name}"] = _decode(
                num_rows, adapters if name == "adapters" else [], prompt_len
            )
    cases[f"prefill of {prefill_len}"] = _prefill(prefill_len)
    with ExitStack() as stack:
        cores = {}
        for kind in KINDS:
            core = EngineCore.from_settings(settings.model_copy(update={"quantization": kind}))
            stack.callback(core.close)
            for name, path in settings.adapter_paths().items():
                core.registry.load(name, path)
            cores[kind] = core
        found = []
        for what, run in cases.items():
            times: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for done in range(-1, repeat):  # the first round warms up
                progress(what, max(done, 0), repeat)
                for kind, core in cores.items():
                    seconds = run(core)
                    if done >= 0:
                        times[kind].append(seconds)
            progress(what, repeat, repeat)
            found.append(QuantizedTimes(what, {kind: Spread.of(times[kind]) for kind in KINDS}))
    return QuantizedFindings(base_bytes, found)


def _decode(
    num_rows: int, adapters: Sequence[str], prompt_len: int
) -> Callable[[EngineCore], float]:
    """Median time of a decode step."""

    def run(core: EngineCore) -> float:
        names = adapters or [core.info.name]
        with decoding(core, num_rows, names, None, prompt_len):
            for _ in range(NUM_FIRST_STEPS):
                core.step()
            return median_s(core.step)

    return run


def _prefill(prompt_len: int) -> Callable[[EngineCore], float]:
    """Time from a prompt to its first token."""

    def once(core: EngineCore) -> float:
        before = core.stats().num_generated_tokens
        lora = core.registry.select(core.info.name, None)
        prompt = tuple(place % core.info.vocab_size for place in range(prompt_len))
        sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        core.add(Request("prompt", prompt, sampling, lora))
        began = time.perf_counter()
        while core.stats().num_generated_tokens == before:
            core.step()
        seconds = time.perf_counter() - began
        core.abort("prompt")
        return seconds

    return lambda core: median(once(core) for _ in range(_NUM_PROMPTS))
