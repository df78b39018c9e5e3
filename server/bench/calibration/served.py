"""What is served and what is calibrated while streams run: an engine, its load, and a job for it.

Either the embedded demo with an adapter's own samples, or a random Llama with random ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from boundary.dataset import Dataset, from_records, load
from boundary.options import CalibrationOptions
from server import demo
from server.bench.calibration.latency import Job
from server.bench.options import BenchOptions
from server.bench.plan import Plan, plan_local
from server.calibration.generation import GenerationOptions
from server.config import ConfigError, Settings
from server.engine.async_engine import AsyncEngine
from server.loading import load_engine, progress_on_stderr

_KV_CACHE_FACTOR = 4
"""Room for more than the streams, as a server has: the texts that a job generates need blocks too."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The job: which adapter (None: the first), how many samples, and of random ones how long."""

    adapter: str | None
    num_samples: int
    prompt_len: int
    completion_len: int
    limit_s: float
    seed: int


@contextmanager
def serving(
    settings: Settings, load_options: BenchOptions, job_options: JobOptions, directory: Path
) -> Iterator[tuple[AsyncEngine, Plan, Job]]:
    """An engine for as long as the block lasts; random weights are written below `directory`.

    Raises ConfigError for an adapter that there is none of.
    """
    with progress_on_stderr() as progress:
        plan = plan_local(settings, load_options, directory, progress)
    name = job_options.adapter or plan.served.adapters[0]
    if name not in plan.served.adapters:
        known = ", ".join(plan.served.adapters)
        raise ConfigError(f"--adapter: no adapter {name!r}; there are: {known}")
    assert plan.settings.kv_cache_bytes is not None  # a closed loop's is planned
    cache_bytes = _KV_CACHE_FACTOR * plan.settings.kv_cache_bytes
    engine = load_engine(plan.settings.model_copy(update={"kv_cache_bytes": cache_bytes}))
    try:
        is_random = load_options.random_model is not None
        job = Job(
            adapter=name,
            dataset=_random(engine, job_options) if is_random else _own(engine, name, job_options),
            options=CalibrationOptions(seed=job_options.seed),
            generation=GenerationOptions(max_num_seqs=settings.max_num_seqs),
            limit_s=job_options.limit_s,
        )
        yield engine, plan, job
    finally:
        engine.shutdown()


def _own(engine: AsyncEngine, name: str, options: JobOptions) -> Dataset:
    return load(
        demo.valid_path(name),
        engine.tokenizer,
        engine.info.max_model_len,
        first=options.num_samples,
    )


def _random(engine: AsyncEngine, options: JobOptions) -> Dataset:
    """Words of `random_model`'s tokenizer, one a token."""
    random = Random(f"{options.seed}/samples")

    def words(number: int) -> str:
        return "".join(f" w{random.randrange(engine.info.vocab_size)}" for _ in range(number))

    records: list[Any] = [
        {"prompt": words(options.prompt_len), "completion": words(options.completion_len)}
        for _ in range(options.num_samples)
    ]
    return from_records(records, engine.tokenizer, engine.info.max_model_len)
