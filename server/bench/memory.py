"""How much memory an engine takes over its weights and its KV cache.

Measured on an engine that is alone in a process of its own: beside a baseline, the two could not be
told apart. On a CPU it is the process's peak resident memory, Python and its libraries included; on
a GPU what PyTorch's allocator had allocated at most.
"""

import asyncio
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from server.bench.in_process import EngineClient
from server.bench.load import drive
from server.bench.workload import WorkItem
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.logs import configure_logs
from server.malloc import keep_little
from server.model import waiting_compiler
from server.model.quantization import linears_of, saved_bytes
from server.model.targets import Targets


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one engine. `weight_bytes` are the base model's and the adapters'."""

    where: str
    peak_bytes: int
    start_bytes: int | None
    """Held before the model was loaded, by Python and the libraries; None where it was not seen."""
    weight_bytes: int
    kv_cache_bytes: int

    @property
    def over_bytes(self) -> int:
        """Peak memory over weights and KV cache."""
        return self.peak_bytes - self.weight_bytes - self.kv_cache_bytes


def measure_alone(settings: Settings, items: Sequence[WorkItem], concurrency: int | None) -> Memory:
    """Load an engine in a fresh process, run the items once, and report its peak."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=waiting_compiler.wait) as pool:
        return pool.submit(_run_alone, settings, items, concurrency).result()


def weight_bytes(settings: Settings) -> int:
    """Base model in the engine's dtype, quantized if it is, and every adapter as it lies on the disk."""
    assert settings.model is not None
    config = AutoConfig.from_pretrained(
        settings.model, revision=settings.revision, trust_remote_code=False
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    dtype: torch.dtype = getattr(torch, settings.dtype)
    num_bytes: int = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    if settings.quantization == "int8":
        num_bytes -= sum(saved_bytes(module, dtype) for module in linears_of(Targets(model)))
    return num_bytes + sum(map(_file_bytes, settings.adapter_paths().values()))


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What one token takes in a cache of plain attention layers, as all served models have."""
    text = config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * num_heads * head_dim * dtype.itemsize)


def peak_rss_bytes(pid: int | str = "self") -> int | None:
    """A process's peak resident memory; None where the system does not tell.

    Not `getrusage`, which on Linux begins with the peak of the process that started this one.
    """
    status = Path(f"/proc/{pid}/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if pid != "self":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run_alone(settings: Settings, items: Sequence[WorkItem], concurrency: int | None) -> Memory:
    configure_logs("warning")
    keep_little()  # as the server does
    is_cuda = settings.device == "cuda"
    start_bytes = None if is_cuda else psutil.Process().memory_info().rss
    engine = AsyncEngine.from_settings(settings, _report_nothing)
    try:
        asyncio.run(drive(EngineClient(engine), items, concurrency))
        stats = engine.stats()
        num_kv_tokens = stats.num_blocks * stats.block_size
    finally:
        engine.shutdown()
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_rss_bytes()
    assert peak is not None
    where = "allocated on the GPU" if is_cuda else "resident in the process"
    config = AutoConfig.from_pretrained(
        str(settings.model), revision=settings.revision, trust_remote_code=False
    )
    per_token = kv_bytes_per_token(config, getattr(torch, settings.dtype))
    return Memory(where, peak, start_bytes, weight_bytes(settings), num_kv_tokens * per_token)


def _report_nothing(_stage: str, _done: int, _total: int) -> None:
    """Progress is the starting process's business."""


def _file_bytes(adapter: Path) -> int:
    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 -- no mapping
