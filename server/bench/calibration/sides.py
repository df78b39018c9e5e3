"""Ways to score every depth of one random Llama with one adapter, for the same samples.

`reference` is one PEFT forward pass a depth; `sweep` PEFT in one forking pass; `server` the same sweep
over the server's own packed model and hooks.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from boundary.dataset import Sample
from boundary.sweep import Scores, reference, sweep
from server.bench.memory import kv_bytes_per_token
from server.bench.random_model import llama_config, save_random_adapter, save_random_model
from server.bench.shape import ModelShape
from server.config import Settings
from server.engine.core import EngineCore
from server.model.calibration_rows import calibration_rows
from server.model.checkpoint import LoraCheckpoint

REFERENCE = "reference"

_KV_TOKENS = 256
"""A sweep needs none of the server's cache, which cannot be empty."""

Side = Callable[[], Scores]


@contextmanager
def three_sides(
    shape: ModelShape, samples: Sequence[Sample], directory: Path, *, rank: int, seed: int
) -> Iterator[dict[str, Side]]:
    """The sides, over a model and an adapter that are written below `directory`."""
    model_path, adapter_path = save(shape, directory, rank=rank, seed=seed)
    model = adapted(model_path, adapter_path)
    token_bytes = kv_bytes_per_token(llama_config(shape), torch.float32)
    settings = Settings.model_validate(
        {
            "model": str(model_path),
            "device": "cpu",
            "dtype": "float32",
            "kv_cache_bytes": _KV_TOKENS * token_bytes,
            "max_lora_rank": rank,
        }
    )
    core = EngineCore.from_settings(settings)
    try:
        checkpoint = core.registry.load("adapter", adapter_path).content
        assert isinstance(checkpoint, LoraCheckpoint)
        with calibration_rows(core.runner, checkpoint) as rows:
            yield {
                REFERENCE: lambda: reference(model, samples),
                "sweep": lambda: sweep(model, samples),
                "server": lambda: sweep(core.runner.model, samples, rows=rows),
            }
    finally:
        core.close()


def save(shape: ModelShape, directory: Path, *, rank: int, seed: int) -> tuple[Path, Path]:
    """Where a random model in float32 and its adapter were written."""
    model_path, adapter_path = directory / "model", directory / "adapter"
    device = torch.device("cpu")
    save_random_model(shape, model_path, dtype=torch.float32, device=device, seed=seed)
    save_random_adapter(shape, adapter_path, rank=rank, seed=seed + 1, base=model_path)
    return model_path, adapter_path


def adapted(model_path: Path, adapter_path: Path) -> PeftModel:
    """A PEFT model in float32, in eval mode."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base: Any = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on missing hub files and deprecated properties
        return PeftModel.from_pretrained(base, str(adapter_path)).eval()


def random_samples(
    num_samples: int, prompt_len: int, completion_len: int, vocab_size: int, seed: int
) -> list[Sample]:
    """All of one length: no padding, which a reference of single samples would not have."""
    random = Random(f"{seed}/samples")

    def draw(length: int) -> tuple[int, ...]:
        return tuple(random.randrange(vocab_size) for _ in range(length))

    return [Sample(draw(prompt_len), draw(completion_len), "") for _ in range(num_samples)]
