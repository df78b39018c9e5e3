"""Invariants 4, 5 and 6: a request ends exactly once, fails alone, and leaves nothing behind."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from server.engine.core import EngineCore
from server.engine.request import RequestOutput
from server.errors import GenerationError
from tests.parity.conftest import AdapterPath, ModelPath
from tests.parity.generation import MAX_STEPS, Generated, generate, greedy, open_core
from tests.parity.mixture import ADAPTERS, SETTINGS, parts, run_mixed
from tests.parity.zoo import NUM_LAYERS, VOCAB_SIZE, random_prompt

OpenMixture = Callable[[], AbstractContextManager[EngineCore]]


@pytest.fixture(scope="module")
def open_mixture(model_path: ModelPath, adapter_path: AdapterPath) -> OpenMixture:
    """A small engine over Llama with the mixture's adapters."""

    @contextmanager
    def opened() -> Iterator[EngineCore]:
        with open_core(model_path("llama"), **SETTINGS) as core:
            for name, cell in ADAPTERS.items():
                core.registry.load(name, adapter_path("llama", *cell))
            yield core

    return opened


@pytest.fixture(scope="module")
def undisturbed(open_mixture: OpenMixture) -> dict[str, Generated]:
    """What the mixture gives when nothing goes wrong; `test_mixed_batch` proves it right."""
    with open_mixture() as core:
        return run_mixed(core)


def num_hooks(model: torch.nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def what_is_held(core: EngineCore) -> dict[str, int]:
    """Everything a request holds while it lives; all 0 when none does."""
    stats = core.stats()
    held = {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "blocks": stats.num_blocks - stats.num_free_blocks,
        "slot users": core.runner.slots.num_users,
    }
    return {what: number for what, number in held.items() if number}


def drain(core: EngineCore) -> list[RequestOutput]:
    outputs = []
    for _ in range(MAX_STEPS):
        if not core.has_work:
            return outputs
        outputs += core.step()
    raise AssertionError(f"work is left after {MAX_STEPS} steps")


@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_random_steps_leave_nothing_and_touch_no_neighbour(
    open_mixture: OpenMixture, undisturbed: dict[str, Generated], seed: int
) -> None:
    draw = random.Random(seed)
    mixture = parts()
    abort_at: dict[int, list[str]] = {}
    for part in draw.sample(mixture, 15):  # some before they join, some after their end
        abort_at.setdefault(part.join_at + draw.randrange(-1, 60), []).append(part.id)
    outputs: list[RequestOutput] = []
    with open_mixture() as core:
        for step in range(MAX_STEPS):
            for part in mixture:
                if part.join_at == step:
                    core.add(part.request(core))
            for request_id in abort_at.get(step, ()):
                last = core.abort(request_id)
                outputs += [last] if last is not None else []
                assert core.abort(request_id) is None, "the second abort finds nothing"
            outputs += core.step() if core.has_work else []
            if step > max(part.join_at for part in mixture) and not core.has_work:
                break
        assert what_is_held(core) == {}
        assert core.stats().num_preemptions > 0
    ends = Counter(output.request_id for output in outputs if output.finished)
    assert ends == Counter(part.id for part in mixture)
    got: dict[str, tuple[int, ...]] = {}
    reasons: dict[str, str | None] = {}
    for output in outputs:
        for delta in output.deltas:
            got[output.request_id] = got.get(output.request_id, ()) + delta.token_ids
            reasons[output.request_id] = delta.finish_reason
    assert set(reasons.values()) == {"abort", "length"}
    for request_id, wanted in undisturbed.items():
        token_ids = got.get(request_id, ())
        assert token_ids == wanted.token_ids[: len(token_ids)], request_id
        if reasons[request_id] == "length":
            assert len(token_ids) == len(wanted.token_ids)


def test_work_in_progress_holds_something_and_close_takes_it_all_away(
    open_mixture: OpenMixture,
) -> None:
    with open_mixture() as core:
        assert num_hooks(core.runner.model) == 0
        for part in parts():
            core.add(part.request(core))
        for _ in range(8):
            core.step()
        held = what_is_held(core)
        assert set(held) == {"running", "waiting", "blocks", "slot users"}
        assert num_hooks(core.runner.model) > 0
        outputs = core.close()
        assert {output.request_id for output in outputs} == {part.id for part in parts()}
        assert all(output.finished for output in outputs)
        assert what_is_held(core) == {}
        assert num_hooks(core.runner.model) == 0


def test_a_step_of_the_base_model_alone_runs_without_hooks(open_mixture: OpenMixture) -> None:
    prompt = random_prompt(20, seed=3)
    with open_mixture() as core:
        deep = core.registry.select("a", "full")
        generate(core, [greedy("adapter", prompt, deep, 2)])
        for request_id, lora in (
            ("base", core.registry.select(core.info.name, None)),
            ("depth 0", core.registry.select("a", 0)),
        ):
            core.add(greedy(request_id, prompt, lora, 2))
            while core.has_work:
                core.step()
                assert num_hooks(core.runner.model) == 0, request_id


def test_a_request_that_makes_the_model_raise_fails_alone(
    open_mixture: OpenMixture, undisturbed: dict[str, Generated]
) -> None:
    used = {token for generated in undisturbed.values() for token in generated.token_ids}
    used = used.union(*(part.prompt for part in parts()))
    poison = next(token for token in range(VOCAB_SIZE) if token not in used)

    def refuse(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if (args[0] == poison).any():
            raise RuntimeError("poisoned")

    with open_mixture() as core:
        handle = core.runner.model.get_input_embeddings().register_forward_pre_hook(refuse)
        mixture = parts()
        for part in mixture[:6]:
            core.add(part.request(core))
        prompt = (*random_prompt(20, seed=4), poison)
        core.add(greedy("poisoned", prompt, core.registry.select("a", NUM_LAYERS), 4))
        for part in mixture[6:]:
            core.add(part.request(core))
        outputs = drain(core)
        assert what_is_held(core) == {}
        handle.remove()
    failed = [output for output in outputs if output.error is not None]
    assert [output.request_id for output in failed] == ["poisoned"]
    assert isinstance(failed[0].error, GenerationError)
    assert failed[0].finished
    tokens: dict[str, tuple[int, ...]] = {}
    for output in outputs:
        for delta in output.deltas:
            tokens[output.request_id] = tokens.get(output.request_id, ()) + delta.token_ids
    del tokens["poisoned"]
    assert tokens == {key: generated.token_ids for key, generated in undisturbed.items()}
