"""Calibrations of the fake engine's adapters: found at once from scores, or held until let go."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from boundary.dataset import Dataset, Sample
from boundary.options import CalibrationOptions
from boundary.outcome import Calibration
from boundary.progress import Progress
from boundary.selection import select
from server.calibration.generation import GenerationOptions
from server.calibration.jobs import Plan
from server.engine.request import AdapterRef
from tests.api.fake_engine import NUM_LAYERS

LAYERS = frozenset(range(NUM_LAYERS))
DEPTH = 5


def found(depth: int = DEPTH, num_samples: int = 40) -> tuple[Calibration, frozenset[int]]:
    """What the engine's slices return if `depth` scores best; at full depth that keeps full."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 0.1, (num_samples, NUM_LAYERS + 1))
    scores[:, depth] += 5
    selection = select(scores, seed=0)
    return Calibration(selection, scores, {}, None, None, {"score": 9}), LAYERS


class Work:
    """What the engine does between steps: some progress, then, when it may, a result or an error."""

    def __init__(self, result: Any = None, *, is_held: bool = False) -> None:
        self.result = found() if result is None else result
        self.began = asyncio.Event()
        self.may_end = asyncio.Event()
        self.num_running = 0
        self.num_cancelled = 0
        self.most = 0
        if not is_held:
            self.may_end.set()

    async def __call__(self, on_progress: Callable[[Any], None]) -> Any:
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        try:
            on_progress(Progress("score", 0, 9))
            on_progress(Progress("score", 4, 9))
            self.began.set()
            await self.may_end.wait()
            if isinstance(self.result, Exception):
                raise self.result
            return self.result
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1


def dataset(num_samples: int = 40) -> Dataset:
    sample = Sample((1, 2, 3), (4, 5), "de")
    return Dataset("completion", (sample,) * num_samples, f"sha256:{'d' * 64}", (), num_samples)


def plan(
    adapter: AdapterRef,
    *,
    activate: bool = True,
    is_dry_run: bool = False,
    num_samples: int = 40,
) -> Plan:
    return Plan(
        adapter=adapter,
        dataset=dataset(num_samples),
        options=CalibrationOptions(),
        generation=GenerationOptions(max_tokens=3, num_shown=1),
        activate=activate,
        is_dry_run=is_dry_run,
        asked={"seed": 0},
    )
