"""Costs that are fitted to steps, and what a step is made of."""

from dataclasses import asdict, astuple, replace
from random import Random

import pytest

from server.bench.capacity.cost import Costs, LoadCosts, StepCosts, fit, residual
from server.bench.capacity.hardware import h200, lora_parameters
from server.bench.capacity.step import StepShape
from server.bench.capacity.timed_steps import TimedStep
from server.bench.shape import NAMED

TRUE = StepCosts(0.01, 0.0006, 5e-6, 0.003, 0.0009, 5e-7, 5e-5, 1e-3)


def shapes(number: int, seed: int) -> list[StepShape]:
    random = Random(seed)
    found = []
    for _ in range(number):
        rows, prompt = random.randint(0, 32), random.choice((0, 0, 16, 64, 256))
        adapters = random.randint(0, 8)
        found.append(
            StepShape(
                rows,
                rows * random.randint(16, 512),
                int(prompt > 0),
                prompt,
                prompt * random.randint(1, 200),
                (rows + prompt) * random.random() if adapters else 0.0,
                float(adapters),
            )
        )
    return [shape for shape in found if shape.num_tokens]


def timed(costs: StepCosts, number: int, seed: int, noise: float = 0.0) -> list[TimedStep]:
    random = Random(seed)
    return [
        TimedStep(shape, 1.0, costs.step_s(shape) * (1 + random.uniform(-noise, noise)))
        for shape in shapes(number, seed)
    ]


def test_a_fit_finds_the_costs_that_made_the_steps() -> None:
    found = fit(timed(TRUE, 200, 0))
    assert astuple(found) == pytest.approx(astuple(TRUE), rel=1e-6)
    noisy = fit(timed(TRUE, 400, 1, noise=0.1))
    left = residual(noisy, timed(TRUE, 200, 2))
    assert left.max < 0.05
    assert abs(left.bias) < 0.02


def test_no_cost_is_negative() -> None:
    cheaper = replace(TRUE, prefill=-0.002, lora_token=-1e-5)
    found = fit(timed(cheaper, 200, 3))
    assert found.prefill == found.lora_token == 0.0
    assert min(astuple(found)) >= 0
    assert residual(found, timed(cheaper, 200, 4)).max > 0.01


def test_a_residual_tells_of_wrong_costs() -> None:
    steps = timed(TRUE, 100, 5)
    assert residual(TRUE, steps).max == pytest.approx(0)
    double = residual(StepCosts(*(2 * value for value in astuple(TRUE))), steps)
    assert double.median == pytest.approx(1)
    assert double.bias == pytest.approx(1)


def test_too_few_kinds_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="8 terms"):
        fit(timed(TRUE, 1, 6) * 100)


def test_costs_are_read_as_they_were_written() -> None:
    costs = Costs(TRUE, LoadCosts(0.1, 0.01))
    assert Costs.from_json(asdict(costs)) == costs


def test_the_gpus_costs_give_back_what_was_measured() -> None:
    hardware, _ = h200()
    step = hardware.costs.step
    assert min(astuple(step)) > 0
    one = StepShape(1, 144)
    many = StepShape(64, 64 * 144)
    lora = replace(many, lora_tokens=64 * 0.625, lora_adapters=8.0)
    assert 1 / step.step_s(one) == pytest.approx(209.7)
    assert 64 / step.step_s(many) == pytest.approx(11_769)
    assert 64 / step.step_s(lora) == pytest.approx(10_583)


def test_an_8b_adapter_has_as_many_numbers_as_peft_gives_it() -> None:
    assert lora_parameters(NAMED["llama-3.1-8b"], 16) == 41_943_040
