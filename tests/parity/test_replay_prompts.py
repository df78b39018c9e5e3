"""Prompts that a program computes, in chunks and beside decode rows, give the model's own logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from server.engine.core import EngineCore
from server.engine.request import Request
from server.model import packed
from server.model.replay import prompt_rows, step_replay
from server.model.replay.noted_step import NotedStep
from server.model.segments import ReachedRows
from tests.parity.conftest import AdapterPath, ModelPath
from tests.parity.generation import generate, greedy, open_core
from tests.parity.test_replay import assert_same, served
from tests.parity.zoo import BY_NAME, NUM_LAYERS, random_prompt, save_model

BY_ROWS = ["llama", "qwen2", "qwen3", "gemma3", "olmo2", "granite"]

SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "prefix_caching": False}
"""Fewer sequences than tokens in a step, so that a prompt is more rows than were noted."""


@pytest.fixture(autouse=True)
def _early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_replay, "MIN_STEPS", 1)


def requests(core: EngineCore) -> list[Request]:
    """Prompts of one step, of several, and of a step that ends one and begins the next."""
    select = core.registry.select
    choices = [
        select("plain", NUM_LAYERS),
        select("dora", NUM_LAYERS),
        select(core.info.name, None),
        select("dora", 2),
        select("plain", 1),
    ]
    return [
        greedy(f"r{index}", random_prompt(length, seed=index), choice, 5)
        for index, (length, choice) in enumerate(zip([40, 9, 5, 3, 21], choices, strict=True))
    ]


def steps_of_the_model(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of rows of each."""
    replay, ran = core.runner.replay, []
    assert replay is not None
    monkeypatch.setattr(replay._foreign_hooks, "exist", lambda: False)  # who only looks on
    core.runner.model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return ran


# int8 weights, as their products are a kernel's on every processor
@pytest.mark.parametrize("name", BY_ROWS)
def test_prompts_are_the_model_s(
    model_path: ModelPath,
    adapter_path: AdapterPath,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    run, shapes = NotedStep.run, []

    def noted(self: NotedStep, rows: Any, *args: Any) -> Any:
        shapes.append((self.num_noted, len(rows.token_ids), len(rows.wanted)))
        return run(self, rows, *args)

    monkeypatch.setattr(NotedStep, "run", noted)
    with served(model_path, adapter_path, name, "float32", "int8", **SMALL) as core:
        ran = steps_of_the_model(core, monkeypatch)
        generate(core, requests(core))
        assert 3 <= len(ran) < len(shapes)  # what was noted, and steps that were checked
        ran.clear()
        replayed = generate(core, requests(core))
        assert ran == []
        assert core.runner.replay is not None
        assert core.runner.replay.why_off is None
    with served(model_path, adapter_path, name, "float32", "int8", **SMALL) as core:
        core.runner.replay = None
        assert_same(replayed, generate(core, requests(core)), "float32")
    assert any(
        num_rows > num_noted and num_wanted == 0 for num_noted, num_rows, num_wanted in shapes
    )
    assert any(num_rows > num_wanted > 1 for _, num_rows, num_wanted in shapes)


def test_an_lm_head_that_is_the_embedding(
    tmp_path: Path, adapter_path: AdapterPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight is not packed, as two read it, and a kernel multiplies it as it lies."""
    monkeypatch.setattr(packed.native, "is_fastest", lambda dtype: True)
    llama = BY_NAME["llama"]

    def tied() -> PretrainedConfig:
        config = llama.make_config()
        config.tie_word_embeddings = True
        return config

    path = save_model(replace(llama, make_config=tied), tmp_path)

    @contextmanager
    def opened() -> Iterator[EngineCore]:
        with open_core(path, **SMALL) as core:
            for name in ("plain", "dora"):
                core.registry.load(name, adapter_path("llama", name))
            yield core

    with opened() as core:
        model = core.runner.model
        assert model.lm_head.weight is model.get_input_embeddings().weight
        ran = steps_of_the_model(core, monkeypatch)
        generate(core, requests(core))
        ran.clear()
        replayed = generate(core, requests(core))
        assert ran == []
    with opened() as core:
        core.runner.replay = None
        assert_same(replayed, generate(core, requests(core)), "float32")


def test_a_part_of_a_prompt_of_which_nothing_is_wanted_shows_nothing(
    model_path: ModelPath, adapter_path: AdapterPath
) -> None:
    """The model computes those until prompts are believed."""
    with served(model_path, adapter_path, "llama", "float32", "int8", **SMALL) as core:
        replay = core.runner.replay
        assert replay is not None
        base = core.registry.select(core.info.name, None)
        generate(core, [greedy("long", random_prompt(60, seed=1), base, 1)])
        (noted,) = replay._noted.values()
        assert noted.checked == [(12, False)]  # the last of them, whose last row is wanted
        assert replay.num_replays == 1


@pytest.mark.parametrize("name", ["phi3", "stablelm"])
def test_where_more_rows_would_move_the_others_the_model_computes_prompts(
    model_path: ModelPath, adapter_path: AdapterPath, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Queries and keys of which only a part may be turned are laid out head by head."""
    with served(model_path, adapter_path, name, "float32", "int8", **SMALL) as core:
        generate(core, requests(core))
        ran = steps_of_the_model(core, monkeypatch)
        generate(core, requests(core))
        assert core.runner.replay is not None
        assert core.runner.replay.why_off is None
        assert ran
        assert min(ran) > 1


def test_without_keeping_the_wanted_rows_it_is_not_believed(
    model_path: ModelPath, adapter_path: AdapterPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = prompt_rows._keep

    def nothing(*args: Any) -> Any:
        bound = keep(*args)
        bound.call.row_bytes = 0
        return bound

    monkeypatch.setattr(prompt_rows, "_keep", nothing)
    with served(model_path, adapter_path, "llama", "float32", "int8", **SMALL) as core:
        generate(core, requests(core))
        assert core.runner.replay is not None
        assert core.runner.replay.why_off is not None


def test_with_lora_at_the_rows_of_before_it_is_not_believed(
    model_path: ModelPath, adapter_path: AdapterPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReachedRows, "among", lambda self, rows: ReachedRows())
    with served(model_path, adapter_path, "llama", "float32", "int8", **SMALL) as core:
        generate(core, requests(core))
        assert core.runner.replay is not None
        assert core.runner.replay.why_off is not None
