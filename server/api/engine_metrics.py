"""Families of what the engine counts, read when somebody asks.

Ten thousand adapters must not be forty thousand series. `--max-metric-adapters` have series of their
own: those that ran first, for as long as the process lives, so that no counter ever falls. What the others
count is summed under a name that no adapter can have.
"""

import time
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server import __version__
from server.api.families import Families
from server.config import Settings
from server.engine.protocol import Engine, LayerCount
from server.engine.request import CalibratedDepth

OTHERS = ":others"
"""Names of adapters have no colon."""


class EngineCollector(Collector):
    """Reads an engine's counters; on whichever thread is asked."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._max_adapters = settings.max_metric_adapters
        self._prefix_caching = settings.prefix_caching
        self._families = Families(engine.info.name)

    def collect(self) -> Iterator[Metric]:
        """One family a figure."""
        stats, make = self._engine.stats(), self._families
        in_use = 1 - stats.num_free_blocks / max(stats.num_blocks, 1)
        for name, text, gauge in (
            ("vllm:num_requests_running", "Sequences in the step.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences waiting.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", in_use),
            ("fathom_kv_blocks", "KV blocks.", stats.num_blocks),
            ("fathom_kv_blocks_free", "KV blocks not in use.", stats.num_free_blocks),
            ("fathom_lora_bytes", "Bytes of adapters on the device.", stats.lora_bytes),
            ("fathom_engine_alive", "1 while steps run.", float(self._engine.is_alive)),
        ):
            yield make.gauge(name, text, gauge)
        for name, text, count in (
            ("vllm:prompt_tokens", "Prompt tokens.", stats.num_prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("vllm:num_preemptions", "Sequences preempted.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Tokens looked up.", stats.num_looked_up_tokens),
            ("vllm:prefix_cache_hits", "Tokens found.", stats.num_cached_tokens),
            ("fathom_recomputed_tokens", "Computed again.", stats.num_recomputed_tokens),
            ("fathom_steps", "Engine steps.", stats.num_steps),
        ):
            yield make.counter(name, text, count)
        steps = self._engine.step_counts()
        yield make.histogram("fathom_step_seconds", "Seconds of a step.", steps.seconds)
        yield make.histogram("fathom_step_sequences", "Sequences in a step.", steps.num_seqs)
        yield make.histogram("vllm:iteration_tokens_total", "Tokens in a step.", steps.num_tokens)
        yield from self._adapters()
        layers = self._engine.layer_counts()
        yield from self._layers(layers)
        yield from self._calibrations(list(layers)[: self._max_adapters])
        yield _info(
            "vllm:cache_config_info",
            "The KV cache.",
            block_size=str(stats.block_size),
            num_gpu_blocks=str(stats.num_blocks),
            enable_prefix_caching=str(self._prefix_caching),
            engine="0",
        )
        yield _info("fathom_build_info", "Version.", version=__version__)

    def _adapters(self) -> Iterator[Metric]:
        make, counts = self._families, self._engine.adapter_counts()
        places = {"device": counts.device, "host": counts.host}
        resident = {key: count.num_resident for key, count in places.items()}
        loads = {key: count.num_loads for key, count in places.items()}
        evictions = {key: count.num_evictions for key, count in places.items()}
        yield make.gauges("fathom_adapters", "Adapters whose weights are there.", "place", resident)
        yield make.gauge("fathom_adapters_known", "That were named or loaded.", counts.num_known)
        yield make.counters("fathom_adapter_loads", "Adapters brought in.", "place", loads)
        yield make.counters(
            "fathom_adapter_evictions", "Adapters that left for another.", "place", evictions
        )

    def _layers(self, layers: Mapping[str, LayerCount]) -> Iterator[Metric]:
        own = dict(list(layers.items())[: self._max_adapters])
        if len(layers) > len(own):
            others = (count for name, count in layers.items() if name not in own)
            own[OTHERS] = sum(others, LayerCount())
        applied = CounterMetricFamily(
            "fathom_lora_layers_applied", "Token-layers with LoRA.", labels=["adapter"]
        )
        skipped = CounterMetricFamily(
            "fathom_lora_layers_skipped", "Token-layers past the depth.", labels=["adapter"]
        )
        for adapter, count in own.items():
            applied.add_metric([adapter], count.applied)
            skipped.add_metric([adapter], count.skipped)
        yield applied
        yield skipped

    def _calibrations(self, first: list[str]) -> Iterator[Metric]:
        """Of the adapters that have series of their own, and of others while there is room."""
        depths = GaugeMetricFamily(
            "fathom_calibrated_depth", "Active calibrated depth.", labels=["adapter"]
        )
        ages = GaugeMetricFamily(
            "fathom_calibration_age_seconds",
            "Since the active record was made.",
            labels=["adapter"],
        )
        found: dict[str, CalibratedDepth] = {}
        calibrated: dict[str, CalibratedDepth] = {}
        for adapter in self._engine.adapters():
            depth = self._engine.calibrated_depth(adapter)
            if depth is not None:
                calibrated[adapter.name] = depth
        for name in (*first, *calibrated):
            if name in calibrated and len(found) < self._max_adapters:
                found[name] = calibrated[name]
        now = time.time()
        for name, depth in found.items():
            depths.add_metric([name], depth.depth)
            # A clock that was set back since would make a negative one.
            ages.add_metric([name], max(0.0, now - depth.calibrated_s))
        yield depths
        yield ages
        yield self._families.gauge(
            "fathom_calibrated_adapters", "Adapters with a calibrated depth.", len(calibrated)
        )


def _info(name: str, text: str, **labels: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
