"""Replayed decode steps give the model's own logits: every architecture, adapters and depths mixed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from server.engine.core import EngineCore
from server.engine.request import Request
from server.model.replay import step_replay
from server.model.replay.bound import Bound
from server.model.replay.program import Program
from tests.parity.conftest import AdapterPath, ModelPath
from tests.parity.generation import Generated, generate, greedy, open_core
from tests.parity.zoo import NUM_LAYERS, SERVED, random_prompt

NOT_REPLAYED = {"gpt2"}
"""Its projections are `Conv1D`, which are not packed, and its Python looks at a number of a tensor."""

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.03}
"""Of ||replayed - run|| / ||run||, a token's logits; bfloat16 rounds to three digits at every operator."""


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs from the first step of a number of rows on."""
    monkeypatch.setattr(step_replay, "MIN_STEPS", 1)


@contextmanager
def served(
    model_path: ModelPath,
    adapter_path: AdapterPath,
    name: str,
    dtype: str,
    quantization: str = "none",
    **settings: Any,
) -> Iterator[EngineCore]:
    with open_core(model_path(name), dtype=dtype, quantization=quantization, **settings) as core:
        for adapter, variant in (("plain", "plain"), ("dora", "dora")):
            core.registry.load(adapter, adapter_path(name, variant))
        yield core


def requests(core: EngineCore) -> list[Request]:
    """Of different lengths, so that the number of rows changes."""
    select = core.registry.select
    choices = [
        select(core.info.name, None),
        select("plain", NUM_LAYERS),
        select("plain", 1),
        select("dora", 2),
    ]
    return [
        greedy(f"r{index}", random_prompt(5 + index, seed=index), choice, 6 + 3 * index)
        for index, choice in enumerate(choices)
    ]


def assert_same(actual: dict[str, Generated], expected: dict[str, Generated], dtype: str) -> None:
    for key, own in expected.items():
        same = actual[key]
        if dtype == "float32":
            assert same.token_ids == own.token_ids
        # Where a rounding made another token, what follows it is another text.
        pairs = zip(same.token_ids, own.token_ids, strict=True)
        length = next((i + 1 for i, (a, b) in enumerate(pairs) if a != b), len(own.rows))
        difference = (same.logits[:length] - own.logits[:length]).norm(dim=-1)
        assert (difference / own.logits[:length].norm(dim=-1)).max() <= TOLERANCE[dtype]


CASES = [(architecture.name, "float32") for architecture in SERVED] + [
    (name, "bfloat16") for name in ("llama", "gemma2", "gpt_oss", "cohere", "glm4", "qwen2_moe")
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_replayed_step_is_the_model_s(
    model_path: ModelPath, adapter_path: AdapterPath, early: None, name: str, dtype: str
) -> None:
    with served(model_path, adapter_path, name, dtype) as core:
        replay = core.runner.replay
        assert replay is not None
        replayed = generate(core, requests(core))
        if name in NOT_REPLAYED:
            assert replay.num_replays == 0
        else:
            assert replay.why_off is None
            assert replay.num_replays > 10
    with served(model_path, adapter_path, name, dtype) as core:
        core.runner.replay = None
        assert_same(replayed, generate(core, requests(core)), dtype)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_however_many_threads_share_a_step(
    model_path: ModelPath, adapter_path: AdapterPath, early: None, num_threads: int
) -> None:
    """More than there are cores, too: then some are always late, and others do what they hold."""
    with served(model_path, adapter_path, "llama", "float32") as core:
        alone = generate(core, requests(core))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with served(model_path, adapter_path, "llama", "float32") as core:
            shared = generate(core, requests(core))
            assert core.runner.replay is not None
            assert core.runner.replay.num_replays > 10
    finally:
        torch.set_num_threads(before)
    assert_same(shared, alone, "float32")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen2"])
def test_programs_see_adapters_that_come_and_go(
    model_path: ModelPath, adapter_path: AdapterPath, early: None, name: str
) -> None:
    """Programs outlive adapters: what was noted with one slot's weights runs with another's later."""

    def texts(core: EngineCore) -> list[dict[str, Generated]]:
        found = []
        for variant, depth in (("plain", NUM_LAYERS), ("dora", 1), ("plain", 1), ("dora", 2)):
            core.registry.load("it", adapter_path(name, variant))
            select = core.registry.select
            found.append(
                generate(
                    core,
                    [
                        greedy("base", random_prompt(5, seed=1), select(core.info.name, None), 6),
                        greedy("it", random_prompt(6, seed=2), select("it", depth), 6),
                    ],
                )
            )
            core.registry.unload("it")
        return found

    with open_core(model_path(name)) as core:
        replay = core.runner.replay
        assert replay is not None
        replayed = texts(core)
        assert replay.num_replays > 10
        assert len(replay._noted) <= 2
    with open_core(model_path(name)) as core:
        core.runner.replay = None
        expected = texts(core)
    for own, other in zip(replayed, expected, strict=True):
        assert_same(own, other, "float32")
    adapted = [one["it"].logits[0] for one in expected]
    assert not torch.allclose(
        adapted[0], adapted[1], atol=1e-3
    )  # or one for another would not show


@pytest.mark.parametrize(
    ("name", "is_one_program"),
    [("llama", True), ("qwen3", True), ("gemma3", True), ("phi3", True), ("mixtral", False)],
)
def test_numbers_of_rows_that_were_never_seen(
    model_path: ModelPath,
    adapter_path: AdapterPath,
    early: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    is_one_program: bool,
) -> None:
    """Where rows are a dimension of everything, they run by the program that is there."""
    with served(model_path, adapter_path, name, "float32", "int8") as core:
        replay = core.runner.replay
        assert replay is not None
        monkeypatch.setattr(replay._foreign_hooks, "exist", lambda: False)  # who only looks on
        generate(core, requests(core)[:2])
        ran: list[int] = []
        core.runner.model.register_forward_pre_hook(
            lambda module, args, kwargs: ran.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        replayed = generate(core, requests(core))
        num_prompt_tokens = min(len(request.prompt_token_ids) for request in requests(core))
        assert (min(ran) >= num_prompt_tokens) == is_one_program
    with served(model_path, adapter_path, name, "float32", "int8") as core:
        core.runner.replay = None
        assert_same(replayed, generate(core, requests(core)), "float32")


def test_the_layers_of_a_step_are_one_call(
    model_path: ModelPath, adapter_path: AdapterPath, early: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products, attention, LoRA and what is between them, without Python: the GIL is let go once."""
    lengths: list[int] = []
    kernels = Program._kernels

    def counted(self: Program, steps: Sequence[Bound], *, is_longest: bool) -> Callable[[], None]:
        lengths.append(len(steps))
        return kernels(self, steps, is_longest=is_longest)

    monkeypatch.setattr(Program, "_kernels", counted)
    # int8 weights, as their products are a kernel's on every processor
    with open_core(model_path("llama"), quantization="int8") as core:
        core.registry.load("plain", adapter_path("llama", "plain"))
        select = core.registry.select
        generate(core, [greedy("r", random_prompt(5, seed=1), select("plain", NUM_LAYERS), 6)])
        assert core.runner.replay is not None
        assert core.runner.replay.num_replays > 3
    # Of a layer four products with LoRA behind each, attention, and at least as many chains.
    assert max(lengths) > NUM_LAYERS * (2 * 4 + 1 + 4)


class TestWhoStillRunsTheModel:
    """What a program could not follow."""

    @pytest.fixture
    def core(self, model_path: ModelPath, early: None) -> Iterator[EngineCore]:
        with open_core(model_path("llama")) as core:
            yield core

    def test_a_hook_of_somebody_else_is_called(self, core: EngineCore) -> None:
        replay, calls = core.runner.replay, []
        assert replay is not None
        generate(core, [self.request(core, "before", 1)])
        assert (before := replay.num_replays) > 0
        handle = core.runner.model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
        generate(core, [self.request(core, "during", 2)])
        handle.remove()
        assert calls
        assert replay.num_replays == before
        generate(core, [self.request(core, "after", 3)])
        assert replay.num_replays > before

    def test_few_steps_of_a_number_of_rows(
        self, core: EngineCore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(step_replay, "MIN_STEPS", 100)
        generate(core, [self.request(core, "r", 1)])
        assert core.runner.replay is not None
        assert core.runner.replay.num_replays == 0

    def test_a_program_that_gives_something_else_is_not_believed(
        self, core: EngineCore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replay, run = core.runner.replay, Program.run
        assert replay is not None
        expected = generate(core, [self.request(core, "r", 1)])
        replay._noted.clear()
        monkeypatch.setattr(
            Program, "run", lambda self, before: [1.1 * one for one in run(self, before)]
        )
        wrong = generate(core, [self.request(core, "r", 1)])
        assert wrong["r"].token_ids == expected["r"].token_ids
        assert replay.why_off is not None
        torch.testing.assert_close(wrong["r"].logits, expected["r"].logits)

    def test_a_program_that_kept_what_it_was_noted_with_is_not_believed(
        self, core: EngineCore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It gives the same at first, and shows itself with the next step's tokens."""
        replay = core.runner.replay
        assert replay is not None
        expected = generate(core, [self.request(core, "r", 1)])
        replay._noted.clear()
        run, kept = Program.run, []

        def stale(self: Program, before: Callable[[], None] | None) -> list[torch.Tensor]:
            kept.append([one.clone() for one in run(self, before)])
            return kept[0]

        monkeypatch.setattr(Program, "run", stale)
        assert (
            generate(core, [self.request(core, "r", 1)])["r"].token_ids == expected["r"].token_ids
        )
        assert replay.why_off is not None

    @staticmethod
    def request(core: EngineCore, request_id: str, seed: int) -> Request:
        lora = core.registry.select(core.info.name, None)
        return greedy(request_id, random_prompt(6, seed=seed), lora, 10)
