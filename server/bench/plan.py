"""Options and settings to a plan: what is served, with which load, against what. Loads no weights.

What contradicts itself is refused here, before anything is made or loaded.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from server.bench.memory import kv_bytes_per_token
from server.bench.mix import Mix, mix_of, parse_mix
from server.bench.options import BenchOptions
from server.bench.over_http import HttpClient, ServedModels
from server.bench.random_model import llama_config, save_random_adapter, save_random_model
from server.bench.shape import ModelShape, parse_shape
from server.bench.trace import TraceRow, at_rate, fit_trace, read_trace
from server.bench.workload import Workload, draw_rows, make_workload, parse_lengths
from server.config import ConfigError, Settings
from server.errors import ModelError
from server.loading import ReportProgress, with_demo
from server.model.loader import max_position, pick_device, pick_dtype
from server.model.prepare import default_block_size

BASELINES = ("generate", "peft")
_REMOTE_VOCAB_SIZE = 1000
"""A server does not tell its vocabulary's size; nearly every one is larger."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is settled before the first weight is loaded."""

    settings: Settings
    """With a model, a dtype and a device by name, unless a server elsewhere is measured."""
    served: ServedModels
    workload: Workload
    concurrency: int | None
    """None is the open loop."""
    baselines: tuple[str, ...]
    facts: dict[str, Any]
    """What the report says of the load."""


def refuse_contradictions(settings: Settings, options: BenchOptions) -> None:
    """Raise ConfigError where two options cannot both be honoured."""
    parse_baselines(options.baselines)
    own_engine = ("random_model", "num_adapters", "baselines", "check", "http")
    for name in own_engine:
        if options.url is not None and getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag}: needs an engine of this command's own, not --url")
    if options.check and options.http:
        raise ConfigError(
            "--check: compares token ids, which HTTP does not carry; leave out --http"
        )
    if options.random_model is not None and settings.model is not None:
        raise ConfigError("--random-model: stands in the place of MODEL; give one of them")
    if options.num_adapters and options.random_model is None:
        raise ConfigError("--num-adapters: makes adapters for a --random-model only")
    if options.mix is not None and options.mix_adapters is not None:
        raise ConfigError("--mix: states adapters and depths itself; leave out --mix-adapters")
    if options.trace_scale is not None and options.trace is None:
        raise ConfigError("--trace-scale: needs a --trace")
    _refuse_idle(options, "mix", ("depths",))
    _refuse_idle(options, "trace", ("prompt_len", "output_len"))
    if options.url is None and options.vocab_size is not None:
        raise ConfigError("--vocab-size: is for --url; a model of ours states its own")


def _refuse_idle(options: BenchOptions, name: str, idle: Sequence[str]) -> None:
    """Raise ConfigError where `name` is given and leaves another option without effect."""
    for other in idle:
        if getattr(options, name) is not None and getattr(options, other) != getattr(
            BenchOptions(), other
        ):
            flag = f"--{other.replace('_', '-')}"
            raise ConfigError(f"{flag}: has no effect beside --{name}")


def parse_baselines(text: str | None) -> tuple[str, ...]:
    """Names in the order given. Raises ConfigError."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(","))) if text else ()
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"--baselines: should be of {', '.join(BASELINES)} (given {name!r})")
    return names


def plan_local(
    settings: Settings, options: BenchOptions, directory: Path, report: ReportProgress
) -> Plan:
    """A plan for an engine of our own; random weights are written under `directory`, last of all."""
    shape = None if options.random_model is None else parse_shape(options.random_model)
    if shape is not None:
        settings = name_random(settings, options, directory)
    settings = with_demo(settings)
    config = read_config(settings) if shape is None else llama_config(shape)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device, config)
    settings = settings.model_copy(
        update={"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    )
    text_config = config.get_text_config()
    served = ServedModels(
        base=settings.served_model_name or str(settings.model).rstrip("/").rsplit("/", 1)[-1],
        adapters=tuple(settings.adapter),
        max_model_len=min(settings.max_model_len or 1 << 30, max_position(text_config)),
    )
    plan = _plan(settings, options, served, text_config.vocab_size)
    if plan.concurrency is not None and settings.kv_cache_bytes is None:
        # What the requests in flight can fill, so that none is preempted and memory is comparable.
        block_size = settings.block_size or default_block_size(device)
        num_tokens = -(-plan.workload.max_len // block_size) * block_size * plan.concurrency
        cache_bytes = max(1 << 16, num_tokens * kv_bytes_per_token(config, dtype))
        settings = settings.model_copy(update={"kv_cache_bytes": cache_bytes})
        plan = replace(plan, settings=settings)
    if shape is not None:
        make_random(shape, settings, options, report)
    return plan


def plan_remote(settings: Settings, options: BenchOptions) -> Plan:
    """A plan for a server that runs already; it says itself what it serves."""
    assert options.url is not None
    served = asyncio.run(ask_models(options.url, settings))
    return _plan(settings, options, served, options.vocab_size or _REMOTE_VOCAB_SIZE)


async def ask_models(url: str, settings: Settings) -> ServedModels:
    """What the server at `url` serves. Raises ConfigError."""
    async with HttpClient(url, api_key=api_key(settings)) as client:
        return await client.models()


def api_key(settings: Settings) -> str | None:
    """The key of the settings, in the clear."""
    return None if settings.api_key is None else settings.api_key.get_secret_value()


def name_random(settings: Settings, options: BenchOptions, directory: Path) -> Settings:
    """Settings that name the random model and its adapters where they will be."""
    adapters = {f"a{index}": directory / f"a{index}" for index in range(options.num_adapters)}
    return settings.model_copy(
        update={
            "model": str(directory / "model"),
            "served_model_name": settings.served_model_name or options.random_model,
            "adapter": settings.adapter | adapters,
        }
    )


def make_random(
    shape: ModelShape, settings: Settings, options: BenchOptions, report: ReportProgress
) -> None:
    """Write what `name_random` named."""
    model = Path(str(settings.model))
    total = 1 + options.num_adapters
    report("random weights", 0, total)
    save_random_model(
        shape,
        model,
        dtype=getattr(torch, settings.dtype),
        device=pick_device(settings.device),
        seed=options.seed,
    )
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    for index in range(options.num_adapters):
        report("random weights", 1 + index, total)
        path, seed = settings.adapter_paths()[f"a{index}"], options.seed + 1 + index
        save_random_adapter(shape, path, rank=options.rank, seed=seed, base=model)
    report("random weights", total, total)


def read_config(settings: Settings) -> PreTrainedConfig:
    """The model's configuration. Raises ModelError."""
    assert settings.model is not None
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no model could be read at {settings.model!r}: {error}") from error
    return config


def _plan(settings: Settings, options: BenchOptions, served: ServedModels, vocab_size: int) -> Plan:
    rows, facts = _rows(options, served.max_model_len)
    mix = _mix(options, served.adapters)
    workload = make_workload(rows, mix, vocab_size, options.seed)
    if workload.max_len > served.max_model_len:
        raise ConfigError(
            f"--prompt-len and --output-len: {workload.max_len} tokens together are over the"
            f" model's {served.max_model_len}"
        )
    is_open = options.rate is not None or options.trace is not None
    facts = {
        "loop": "open" if is_open else "closed",
        "concurrency": options.concurrency,
        "requests": options.num_requests,
        **facts,
        "mix": ",".join(f"{choice}={weight:g}" for choice, weight in mix),
        "seed": options.seed,
    }
    concurrency = None if is_open else options.concurrency
    baselines = parse_baselines(options.baselines)
    return Plan(settings, served, workload, concurrency, baselines, facts)


def _rows(options: BenchOptions, max_len: int) -> tuple[Sequence[TraceRow], dict[str, Any]]:
    if options.trace is None:
        prompt_len = parse_lengths("--prompt-len", options.prompt_len)
        output_len = parse_lengths("--output-len", options.output_len)
        rows = draw_rows(prompt_len, output_len, options.num_requests, options.rate, options.seed)
        facts: dict[str, Any] = {"prompt": options.prompt_len, "completion": options.output_len}
        return rows, facts | ({} if options.rate is None else {"rate": options.rate})
    fitted = fit_trace(
        read_trace(options.trace, options.num_requests), max_len, options.trace_scale
    )
    trace_rows = fitted.rows if options.rate is None else at_rate(fitted.rows, options.rate)
    return trace_rows, {
        "trace": options.trace.name,
        "length scale": round(fitted.scale, 4),
        "clipped rows": fitted.num_clipped,
        "rate": options.rate or "as recorded",
    }


def _mix(options: BenchOptions, adapters: Sequence[str]) -> Mix:
    if options.mix is not None:
        return parse_mix(options.mix, adapters)
    wanted = options.mix_adapters
    if wanted is not None and wanted > len(adapters):
        raise ConfigError(f"--mix-adapters: {wanted} are more than the {len(adapters)} there are")
    return mix_of(adapters[:wanted], options.depths)
