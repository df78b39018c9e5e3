"""What a step costs, as a sum of few terms, fitted to steps that were timed.

    seconds = base + decode_row * decode rows + decode_pair * keys that they read
            + prefill * (1 if any prompt) + prefill_token * prompt tokens
            + prefill_pair * query-key pairs of prompts
            + lora_token * tokens * depth share + lora_adapter * distinct adapters * depth share

The fit is least squares of relative errors; a coefficient that would be negative is left out, because a
step that costs less for doing more would let a simulator win time by waiting.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

import numpy as np

from server.bench.capacity.step import StepShape
from server.bench.capacity.timed_steps import TimedStep


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of each term. On a CPU: of one thread's processor time."""

    base: float = 0.0
    decode_row: float = 0.0
    decode_pair: float = 0.0
    prefill: float = 0.0
    prefill_token: float = 0.0
    prefill_pair: float = 0.0
    lora_token: float = 0.0
    lora_adapter: float = 0.0

    def step_s(self, shape: StepShape) -> float:
        """Of one step."""
        return (
            self.base
            + self.decode_row * shape.decode_rows
            + self.decode_pair * shape.decode_pairs
            + self.prefill * (shape.prefill_rows > 0)
            + self.prefill_token * shape.prefill_tokens
            + self.prefill_pair * shape.prefill_pairs
            + self.lora_token * shape.lora_tokens
            + self.lora_adapter * shape.lora_adapters
        )


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """Seconds to bring one adapter in. disk_s: into host memory, its request waits. slot_s: from there
    into a device slot, the whole step waits."""

    disk_s: float = 0.0
    slot_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that takes time on paper."""

    step: StepCosts
    load: LoadCosts = LoadCosts()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Costs":
        """What `asdict` gave."""
        return cls(StepCosts(**content["step"]), LoadCosts(**content["load"]))


@dataclass(frozen=True, slots=True)
class Residual:
    """Predicted over measured, less one, of median steps that look the same."""

    num_steps: int
    median: float
    p95: float
    max: float
    bias: float
    """Of all their time together."""


def fit(steps: Sequence[TimedStep]) -> StepCosts:
    """The costs that fit best. Raises ValueError for fewer kinds of steps than there are terms."""
    names = [field.name for field in fields(StepCosts)]
    rows = np.array([_terms(step.shape) for step in steps])
    seconds = np.array([step.cpu_s for step in steps])
    if len(np.unique(rows, axis=0)) < len(names):
        raise ValueError(
            f"{len(names)} terms cannot be told from {len(np.unique(rows, axis=0))} steps"
        )
    weighted = rows / seconds[:, None]
    kept = list(range(len(names)))
    while True:
        found, *_ = np.linalg.lstsq(weighted[:, kept], np.ones(len(steps)), rcond=None)
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]
    return StepCosts(
        **{names[index]: float(value) for index, value in zip(kept, found, strict=True)}
    )


def residual(costs: StepCosts, steps: Sequence[TimedStep]) -> Residual:
    """How far the costs are from steps."""
    errors = [abs(costs.step_s(step.shape) / step.cpu_s - 1) for step in steps]
    total = sum(costs.step_s(step.shape) for step in steps) / sum(step.cpu_s for step in steps)
    return Residual(
        len(steps), median(errors), float(np.percentile(errors, 95)), max(errors), total - 1
    )


def _terms(shape: StepShape) -> list[float]:
    """The factor of each cost, found by setting it to one: `step_s` alone says what a step costs."""
    names = [field.name for field in fields(StepCosts)]
    zero = asdict(StepCosts())
    return [StepCosts(**(zero | {name: 1.0})).step_s(shape) for name in names]
