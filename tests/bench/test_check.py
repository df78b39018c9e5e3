"""The check passes for the engine and fails for one whose adapter was altered."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.bench.baseline import StaticModel, load_baselines
from server.bench.check import CheckResult, check, sample
from server.bench.in_process import EngineClient
from server.bench.mix import Choice
from server.bench.random_model import save_random_adapter, save_random_model
from server.bench.shape import parse_shape
from server.bench.workload import WorkItem
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.request import Request

SHAPE = parse_shape("2x32:vocab=100:positions=64")
CHOICES = [Choice(), Choice("a0"), Choice("a0", 1)]
ITEMS = [
    WorkItem(tuple(range(index, index + 8)), 12, CHOICES[index % len(CHOICES)])
    for index in range(6)
]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "a0"


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(tmp_path: Path, adapter: Path, dtype: str) -> Settings:
    model = tmp_path / "model"
    cpu = torch.device("cpu")
    save_random_model(SHAPE, model, dtype=getattr(torch, dtype), device=cpu, seed=0)
    save_random_adapter(SHAPE, adapter, rank=4, seed=1, base=model)
    return Settings(
        model=str(model),
        adapter={"a0": adapter},
        adapter_root=adapter.parent,
        device="cpu",
        dtype=dtype,
        kv_cache_bytes=1 << 20,
    )


@pytest.fixture
def reference(settings: Settings) -> StaticModel:
    (peft,) = load_baselines(["peft"], settings, CHOICES, "dynamic")
    return peft


@pytest.fixture
def client(settings: Settings) -> Iterator[EngineClient]:
    engine = AsyncEngine.from_settings(settings)
    yield EngineClient(engine)
    engine.shutdown()


def test_the_engine_passes(client: EngineClient, reference: StaticModel, dtype: str) -> None:
    found = check(client, reference, ITEMS, dtype)
    assert found.is_passed
    assert found.num_tokens == 6 * 12
    assert f"passed against peft in {dtype}" in str(found)
    if dtype == "float32":
        assert found.num_equal_tokens == found.num_tokens
        assert "passed against peft in float32: 72 of 72 tokens" in str(found)


def test_in_16_bits_it_may_be_hardly_farther_from_float32_than_the_reference_is(
    client: EngineClient, reference: StaticModel, dtype: str
) -> None:
    """And the reference is afterwards what it was."""
    before = reference.log_probabilities(ITEMS[1], ITEMS[1].prompt)
    found = check(client, reference, ITEMS, dtype)
    assert found.tolerance < 0.02
    assert found.mean_tolerance < 0.004
    assert torch.equal(reference.log_probabilities(ITEMS[1], ITEMS[1].prompt), before)


def test_an_altered_adapter_fails(
    client: EngineClient, reference: StaticModel, adapter: Path, dtype: str
) -> None:
    altered = adapter.parent / "altered"
    altered.mkdir()
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.0" in name and "lora_B" in name)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, altered / weights.name)
    config = adapter / "adapter_config.json"
    (altered / config.name).write_bytes(config.read_bytes())

    asyncio.run(client.engine.load_adapter("a0", altered, replace=True))
    found = check(client, reference, ITEMS, dtype)
    assert not found.is_passed
    assert found.max_logprob_error > (10 if dtype == "float32" else 2) * found.tolerance
    assert "FAILED" in str(found)


def test_a_depth_that_is_not_honoured_fails(
    client: EngineClient, reference: StaticModel, dtype: str
) -> None:
    class Deaf(EngineClient):
        async def request(self, item: WorkItem, logprobs: int | None = None) -> Request:
            whole = replace(item, choice=replace(item.choice, depth=None))
            return await super().request(whole, logprobs)

    found = check(Deaf(client.engine), reference, ITEMS, dtype)
    assert not found.is_passed


def result(*, error: float = 0.0, mean: float = 0.0, margin: float = 0.0) -> CheckResult:
    return CheckResult("peft", "bfloat16", 0.25, 0.05, 1, 10, 9, error, mean, margin)


def test_what_the_tolerance_bounds() -> None:
    assert result(error=0.25, mean=0.05, margin=0.25).is_passed
    assert not result(error=0.26).is_passed
    assert not result(margin=0.26).is_passed
    assert not result(error=0.25, mean=0.06).is_passed


def test_a_sample_has_every_choice() -> None:
    found = sample([ITEMS[0], ITEMS[3], ITEMS[1], ITEMS[4], ITEMS[2]], 2)
    assert {item.choice for item in found} == set(CHOICES)
    assert len(sample(ITEMS, 4)) == 4
