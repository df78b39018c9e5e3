"""The baselines beside one plain forward pass a row, and how they form their batches."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.bench.baseline import StaticModel, load_baselines, run_batches
from server.bench.mix import Choice
from server.bench.random_model import save_random_adapter, save_random_model
from server.bench.shape import parse_shape
from server.bench.workload import WorkItem
from server.config import Settings

SHAPE = parse_shape("2x32:vocab=100:positions=64")
CHOICES = [Choice(), Choice("a0"), Choice("a0", 1), Choice("a0", 0), Choice("a1")]
ITEMS = [
    WorkItem(tuple(range(3 + index, 10 + 2 * index)), 4 + index, choice)
    for index, choice in enumerate(CHOICES)
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    directory = tmp_path_factory.mktemp("random")
    model = directory / "model"
    cpu = torch.device("cpu")
    save_random_model(SHAPE, model, dtype=torch.float32, device=cpu, seed=0)
    adapters: dict[str, Path] = {}
    for seed, name in enumerate(("a0", "a1"), start=1):
        adapters[name] = directory / name
        save_random_adapter(SHAPE, adapters[name], rank=4, seed=seed, base=model)
    return Settings(model=str(model), adapter=adapters, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def baselines(settings: Settings) -> dict[str, StaticModel]:
    made = load_baselines(["generate", "peft"], settings, CHOICES, "dynamic")
    return {baseline.name: baseline for baseline in made}


@pytest.mark.parametrize("name", ["generate", "peft"])
def test_a_padded_batch_says_what_each_row_says_alone(
    baselines: dict[str, StaticModel], name: str
) -> None:
    model = baselines[name]
    for item, tokens in zip(ITEMS, model.complete(ITEMS), strict=True):
        assert len(tokens) == item.output_len
        assert model.log_probabilities(item, tokens).argmax(1).tolist() == tokens


def test_each_choice_is_a_model_of_its_own(baselines: dict[str, StaticModel]) -> None:
    def scores(name: str, choice: Choice) -> Tensor:
        item = WorkItem((1, 2, 3), 2, choice)
        return baselines[name].log_probabilities(item, [4, 5])

    base = scores("generate", Choice())
    assert torch.allclose(scores("peft", Choice()), base, atol=1e-6)
    assert torch.allclose(scores("peft", Choice("a0", 0)), base, atol=1e-6)
    models = [base, *(scores("peft", CHOICES[index]) for index in (1, 2, 4))]
    for index, one in enumerate(models):
        for other in models[:index]:
            assert float((one - other).abs().max()) > 1e-2


def test_a_depth_beyond_the_layers_is_the_whole_adapter(settings: Settings) -> None:
    choices = [Choice("a0"), Choice("a0", SHAPE.num_layers)]
    (peft,) = load_baselines(["peft"], settings, choices, "dynamic")
    one, other = (
        peft.log_probabilities(WorkItem((1, 2, 3), 2, choice), [4, 5]) for choice in choices
    )
    assert torch.equal(one, other)


def test_baselines_share_their_weights(settings: Settings) -> None:
    generate, peft = load_baselines(["generate", "peft"], settings, CHOICES, "dynamic")

    def pointers(baseline: object) -> set[int]:
        model = baseline._model  # type: ignore[attr-defined]
        named = model.named_parameters()
        return {parameter.data_ptr() for name, parameter in named if "lora" not in name}

    assert pointers(generate) == pointers(peft)


def test_output_matrices_are_not_copied_for_each_row(baselines: dict[str, StaticModel]) -> None:
    for baseline in baselines.values():
        lm_head = baseline._model.get_output_embeddings()  # type: ignore[attr-defined]
        hidden = torch.randn(8, 4, SHAPE.hidden_size)[:, -1:]
        with torch.inference_mode(), torch.profiler.profile() as profile:
            lm_head(hidden)
        names = {event.key for event in profile.key_averages()}
        assert "aten::mm" in names
        assert "aten::bmm" not in names


class Recorder:
    """A model that notes its batches."""

    name = "recorder"

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def complete(self, batch: Sequence[WorkItem]) -> list[list[int]]:
        self.batches.append([item.prompt[0] for item in batch])
        return [[0] * item.output_len for item in batch]

    def log_probabilities(self, item: WorkItem, completion: Sequence[int]) -> Tensor:
        raise NotImplementedError


def items(output_lens: Sequence[int], gap_s: float = 0.0) -> list[WorkItem]:
    return [
        WorkItem((index,), output_len, Choice(), index * gap_s)
        for index, output_len in enumerate(output_lens)
    ]


def test_batches_of_a_closed_loop_are_of_like_lengths() -> None:
    model = Recorder()
    result = run_batches(model, items([9, 1, 8, 2, 5]), 2, is_open=False)
    assert model.batches == [[1, 3], [4, 2], [0]]
    assert sum(timing.num_output_tokens for timing in result.timings) == 25


def test_batches_of_an_open_loop_are_what_has_arrived() -> None:
    model = Recorder()
    result = run_batches(model, items([1] * 5), 2, is_open=True)
    assert model.batches == [[0, 1], [2, 3], [4]]
    model = Recorder()
    result = run_batches(model, items([1] * 3, gap_s=0.05), 2, is_open=True)
    assert [index for batch in model.batches for index in batch] == [0, 1, 2]
    assert [timing.start_s for timing in result.timings] == [0.0, 0.05, 0.1]
    assert all(timing.end_s >= timing.start_s for timing in result.timings)
