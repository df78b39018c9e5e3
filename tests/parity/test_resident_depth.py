"""Whatever part of an adapter is on the device, each request gets its own depth's answer."""

from collections.abc import Iterator
from typing import Any

import pytest

from server.engine.core import EngineCore
from server.engine.request import CalibratedDepth
from server.model.adapters import AdapterSlots
from tests.parity.conftest import AdapterPath, ModelPath
from tests.parity.generation import Generated, generate, greedy, open_core
from tests.parity.mixture import ADAPTERS, SETTINGS, mismatches, run_mixed
from tests.parity.zoo import NUM_LAYERS, random_prompt

PROMPT = random_prompt(9, seed=3)
DEPTHS = range(NUM_LAYERS + 1)


@pytest.fixture(scope="module")
def whole(model_path: ModelPath, adapter_path: AdapterPath) -> dict[str, Generated]:
    """The mixture where adapters are kept whole; `test_mixed_batch` proves it right."""
    with open_core(model_path("llama"), **SETTINGS) as core:
        load(core, adapter_path)
        return run_mixed(core)


@pytest.fixture
def core(model_path: ModelPath, adapter_path: AdapterPath) -> Iterator[EngineCore]:
    """The same engine, kept below calibrated depths, with room for half of what all adapters take."""
    settings: dict[str, Any] = SETTINGS | {"resident_depth": "auto", "max_loras": 6}
    with open_core(model_path("llama"), **settings, max_lora_bytes=200_000) as opened:
        load(opened, adapter_path)
        yield opened


def load(core: EngineCore, adapter_path: AdapterPath) -> None:
    for name, cell in ADAPTERS.items():
        core.registry.load(name, adapter_path("llama", *cell))


def calibrate(core: EngineCore, depth: int) -> None:
    """Activate a depth for every adapter."""
    core.registry.depths.set_calibrated(
        {str(ref.digest): CalibratedDepth(depth, 1, 0.0) for ref in core.registry.known()}
    )


def watch(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Depths that were on the device after any step."""
    seen: set[int] = set()
    step = core.step

    def watched() -> Any:
        outputs = step()
        seen.update(core.runner.slots.resident_depths.values())
        budget = core.runner.slots._max_bytes
        assert budget is None or core.runner.slots.num_bytes <= budget
        return outputs

    monkeypatch.setattr(core, "step", watched)
    return seen


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_mixture_at_all_depths_does_not_tell_what_is_kept(
    core: EngineCore, whole: dict[str, Generated], monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    calibrate(core, depth)
    seen = watch(core, monkeypatch)
    assert mismatches(run_mixed(core), whole) == []
    assert len(seen) > 1 or depth == NUM_LAYERS, f"every slot held the same: {seen}"
    assert core.runner.slots.num_users == 0


def test_another_depth_is_activated_while_requests_run(
    core: EngineCore, whole: dict[str, Generated], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(core, monkeypatch)
    step, num_steps = core.step, 0

    def changing() -> Any:
        nonlocal num_steps
        num_steps += 1
        calibrate(core, num_steps % (NUM_LAYERS + 1))
        return step()

    monkeypatch.setattr(core, "step", changing)
    assert mismatches(run_mixed(core), whole) == []
    assert len(seen) > 2


@pytest.mark.parametrize(
    "variant", ["embedding", "lm_head", "lm_head_and_low_layers", "some_layers"]
)
@pytest.mark.parametrize("kept", DEPTHS)
def test_what_lies_outside_the_layers_goes_with_its_depth(
    model_path: ModelPath, adapter_path: AdapterPath, variant: str, kept: int
) -> None:
    path = adapter_path("llama", variant)
    results = []
    for resident in ("full", "auto"):
        with open_core(model_path("llama"), resident_depth=resident) as core:
            core.registry.load("x", path)
            calibrate(core, kept)
            # One at a time and rising, so that each depth finds what the one before needed.
            results.append(
                {
                    name: got
                    for depth in DEPTHS
                    for name, got in generate(
                        core, [greedy(f"{depth}", PROMPT, core.registry.select("x", depth), 4)]
                    ).items()
                }
            )
    whole, kept_below = results
    assert mismatches(kept_below, whole) == []
    assert len({got.token_ids for got in whole.values()}) > 1  # depths do differ


def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that never takes more than one layer, whatever a request needs."""
    acquire = AdapterSlots.acquire

    def stuck(
        slots: AdapterSlots, uid: int, checkpoint: Any, depth: int, keep_depth: int | None
    ) -> int | None:
        slot = acquire(slots, uid, checkpoint, 1, 1)
        slots._residents[uid].users[1] -= 1
        slots._residents[uid].users[depth] += 1
        return slot

    monkeypatch.setattr(AdapterSlots, "acquire", stuck)


def one_request(core: EngineCore) -> dict[str, Generated]:
    return generate(core, [greedy("x", PROMPT, core.registry.select("a", NUM_LAYERS), 6)])


def test_a_layer_that_is_missing_ends_the_request(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow(monkeypatch)
    core.add(greedy("x", PROMPT, core.registry.select("a", NUM_LAYERS), 6))
    (output,) = core.step()
    assert output.finished
    assert "below depth 1, not 4" in str(output.error)


def test_without_the_check_it_would_be_another_answer(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this file compares does tell a slot that is too shallow."""
    expected = one_request(core)
    shallow(monkeypatch)
    monkeypatch.setattr(AdapterSlots, "check", lambda *_: None)
    core.runner.slots.clear()
    core.blocks.prefix_caching = False
    assert mismatches(one_request(core), expected) != []
