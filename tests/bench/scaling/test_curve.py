"""Points take turns, no run repeats another's prompts, and what a launch is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.bench.load import LoadResult
from server.bench.measure import Spread
from server.bench.scaling import curve, loads
from server.bench.scaling.curve import measure_curve
from server.bench.scaling.explanation import (
    Explanation,
    Machine,
    StepCost,
    count_launches,
)
from server.bench.scaling.options import ScalingOptions
from server.bench.workload import WorkItem

OPTIONS = ScalingOptions(
    random_model="2x32:vocab=5000:positions=64", num_adapters=2, concurrency=2, rounds=1,
    prompt_len=6, output_len=4,
)  # fmt: skip
CPU = torch.device("cpu")


def test_points_take_turns_and_no_prompt_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that come again would be answered from the prefix cache."""
    driven: list[tuple[int, list[WorkItem]]] = []

    async def drive(_client: Any, items: list[WorkItem], concurrency: int) -> LoadResult:
        driven.append((concurrency, items))
        return LoadResult(1.0, (), None)

    monkeypatch.setattr(curve, "drive", drive)
    plan = loads.concurrency(OPTIONS, (1, 2, 4))
    engine: Any = SimpleNamespace()
    found = measure_curve(engine, plan.quantity, plan.loads, 2, lambda *_: None)
    assert [concurrency for concurrency, _ in driven] == [1, 2, 4] * 3
    assert [len(point.runs) for point in found.points] == [2, 2, 2]
    prompts = [item.prompt for _, items in driven for item in items]
    assert len(set(prompts)) == len(prompts)


def test_each_curve_changes_its_own_quantity_only() -> None:
    adapters = loads.adapters(OPTIONS, (1, 4))
    assert [load.concurrency for load in adapters.loads] == [4, 4]
    for load in adapters.loads:
        assert len({choice.adapter for choice in load.workload.choices}) == load.x
    for load in loads.depth(OPTIONS, ()).loads:
        assert {choice.depth for choice in load.workload.choices} == {load.x}
    ranks = loads.rank(OPTIONS, (8, 16))
    for load in ranks.loads:
        assert {ranks.ranks[str(choice.adapter)] for choice in load.workload.choices} == {load.x}
    context = loads.context(OPTIONS, (5, 50))
    assert [load.workload.max_len for load in context.loads] == [9, 54]
    assert context.max_len == 54


def test_a_view_is_no_launch() -> None:
    x = torch.ones(4, 4)
    assert count_launches(lambda: x @ x, CPU) == 1
    assert count_launches(lambda: x.t()[:2], CPU) == 0
    assert count_launches(lambda: x.t().mul_(2).add_(1), CPU) == 2


def test_the_explanation_is_the_roofline_of_what_was_left_out() -> None:
    def step(depth: int, seconds: float, launches: int) -> StepCost:
        return StepCost(depth, Spread.of([seconds]), launches, 1000 * depth, 10 * depth)

    machine = Machine(bytes_per_s=1e6, flops_per_s=1e6, launch_s=1e-3)
    found = Explanation(4, 2, machine, (step(0, 1.0, 10), step(2, 1.5, 30)))
    assert found.saved_s(found.steps[0]) == 0.5
    assert found.explained_s(found.steps[0]) == pytest.approx(2000 / 1e6 + 20e-3)
    assert found.explained_s(found.steps[1]) == 0
    slow = Machine(bytes_per_s=1e6, flops_per_s=1e3, launch_s=0)
    assert slow.least_s(1000, 10, 5) == 0.01  # of bytes and products, whichever takes longer
