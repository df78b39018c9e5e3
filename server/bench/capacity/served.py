"""The model and adapters that are measured, and the same settings for a server and for paper."""

from collections.abc import Iterator
from contextlib import contextmanager

from server.bench.capacity.arrivals import adapter_name
from server.bench.capacity.comparison import OUTPUT, PROMPT
from server.bench.capacity.measurement import MAX_LEN, MAX_LORAS, MAX_ROWS
from server.bench.capacity.replica import ReplicaSettings
from server.bench.scaling.options import ScalingOptions
from server.bench.scaling.run import scratch
from server.bench.scaling.served import Served
from server.config import Settings
from server.loading import ReportProgress, with_demo

RANK = 16


@contextmanager
def random_settings(
    random_model: str, num_adapters: int, seed: int, progress: ReportProgress
) -> Iterator[Settings]:
    """A random Llama with so many random adapters on the disk, while the block lasts."""
    options = ScalingOptions(random_model=random_model, rank=RANK, seed=seed)
    names = [adapter_name(index) for index in range(num_adapters)]
    with scratch() as directory:
        served = Served(options, dict.fromkeys(names, RANK), directory, progress)
        yield served.settings(
            max_len=MAX_LEN, concurrency=MAX_ROWS, max_loras=MAX_LORAS, prefix_caching=False
        )


def demo_settings() -> Settings:
    """The embedded demo on a CPU."""
    given = {"device": "cpu", "max_loras": MAX_LORAS, "kv_cache_bytes": 256 << 20}
    return with_demo(Settings.model_validate(given | {"prefix_caching": False}))


def compared(settings: Settings, max_cpu_loras: int) -> Settings:
    """For a server of requests as they are compared; most of its adapters are not in host memory."""
    return settings.model_copy(
        update={
            "max_cpu_loras": max_cpu_loras,
            "max_model_len": PROMPT.high + OUTPUT.high,
            "prefix_caching": True,
        }
    )


def on_paper(settings: Settings, num_layers: int) -> ReplicaSettings:
    """What a replica with `random_settings` is to a simulator."""
    return ReplicaSettings(
        num_layers=num_layers,
        max_loras=settings.max_loras,
        max_cpu_loras=settings.max_cpu_loras,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_waiting=settings.max_num_waiting,
        kv_tokens=MAX_ROWS * MAX_LEN,
    )
