"""Prometheus metrics: what the engine counts, read on each scrape, and what clients feel, observed.

Names are vLLM's where the meaning is the same, so that gateways which scrape them work, and
`fathom_` where it is ours. Latencies are the event loop's: they include queues and hand-over.
`waiting` in `vllm:lora_requests_info` means that no output has come yet.
"""

import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from server import __version__
from server.config import Settings
from server.engine.protocol import Engine
from server.engine.request import Request, RequestOutput

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_LONG = (*_SECONDS, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """One registry for one server."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._model = engine.info.name
        self.in_flight: dict[str, Observer] = {}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(self._model)

        self.first_token_s = histogram(
            "vllm:time_to_first_token_seconds", "Seconds to the first token.", _LONG
        )
        self.inter_token_s = histogram(
            "vllm:inter_token_latency_seconds", "Seconds between outputs.", _SECONDS
        )
        self.request_s = histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from arrival to the end.", _LONG
        )
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.generation_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS
        )
        self._successes = Counter(
            "vllm:request_success",
            "Sequences that ended by themselves.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._aborts = Counter(
            "fathom_requests_aborted",
            "Requests that ended early, by cause.",
            ["model_name", "cause"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine, settings, self))

    def observe(self, request: Request) -> "Observer":
        """Follow one engine request; its owner tells what happens."""
        observer = Observer(self, request)
        self.in_flight[request.id] = observer
        return observer

    def succeeded(self, finish_reason: str) -> None:
        """Count a sequence that ended by itself."""
        self._successes.labels(self._model, finish_reason).inc()

    def aborted(self, cause: str) -> None:
        """Count a request that did not."""
        self._aborts.labels(self._model, cause).inc()


class Observer:
    """What one engine request did, and when."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self.request = request
        self.has_started = False
        self._last_s = request.arrival_s
        self._has_tokens = False
        self._is_finished = False

    def output(self, output: RequestOutput) -> None:
        """One output came."""
        self.has_started = True
        now = time.monotonic()
        if any(delta.token_ids for delta in output.deltas):
            since_last = now - self._last_s
            if self._has_tokens:
                self._metrics.inter_token_s.observe(since_last)
            else:
                self._metrics.first_token_s.observe(since_last)
            self._has_tokens = True
            self._last_s = now
        for delta in output.deltas:
            if delta.finish_reason in ("stop", "length"):
                self._metrics.succeeded(delta.finish_reason)
        if output.finished and output.error is None:
            self._is_finished = True
            self._metrics.request_s.observe(now - self.request.arrival_s)
            self._metrics.prompt_tokens.observe(output.num_prompt_tokens)
            self._metrics.generation_tokens.observe(output.num_output_tokens)

    def end(self, cause: str) -> None:
        """Nothing more comes; `cause` counts if the request had not finished."""
        self._metrics.in_flight.pop(self.request.id, None)
        if not self._is_finished:
            self._metrics.aborted(cause)


class _EngineCollector(Collector):
    """The engine's own counters, read when somebody asks."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """One family a figure."""
        stats = self._engine.stats()
        in_use = 1 - stats.num_free_blocks / max(stats.num_blocks, 1)
        yield self._gauge("vllm:num_requests_running", "Requests in the step.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting.", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", in_use)
        yield self._gauge("fathom_kv_blocks", "KV blocks.", stats.num_blocks)
        yield self._gauge("fathom_kv_blocks_free", "KV blocks not in use.", stats.num_free_blocks)
        yield self._gauge("fathom_lora_bytes", "Adapters on the device.", stats.lora_bytes)
        yield self._gauge("fathom_engine_alive", "1 while steps run.", float(self._engine.is_alive))
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens.", stats.num_prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("vllm:num_preemptions", "Sequences preempted.", stats.num_preemptions),
            ("fathom_recomputed_tokens", "Computed again.", stats.num_recomputed_tokens),
            ("vllm:prefix_cache_queries", "Tokens looked up.", stats.num_prompt_tokens),
            ("vllm:prefix_cache_hits", "Tokens found.", stats.num_cached_tokens),
            ("fathom_steps", "Engine steps.", stats.num_steps),
        ):
            yield self._counter(name, text, value)
        yield from self._layers()
        yield self._lora_requests()
        yield from self._calibrations()
        build = GaugeMetricFamily("fathom_build_info", "Version.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build

    def _layers(self) -> Iterator[Metric]:
        labels = ["adapter"]
        applied = CounterMetricFamily(
            "fathom_lora_layers_applied", "Token-layers with LoRA.", labels=labels
        )
        skipped = CounterMetricFamily(
            "fathom_lora_layers_skipped", "Token-layers past the depth.", labels=labels
        )
        for adapter, count in self._engine.layer_counts().items():
            applied.add_metric([adapter], count.applied)
            skipped.add_metric([adapter], count.skipped)
        yield applied
        yield skipped

    def _lora_requests(self) -> Metric:
        """vLLM's way to tell a gateway which adapters are busy: names in labels, time as value."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running stats on LoRA requests.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        busy = self._metrics.in_flight.values()
        family.add_metric(
            [
                str(self._settings.max_loras),
                _names(observer for observer in busy if observer.has_started),
                _names(observer for observer in busy if not observer.has_started),
            ],
            time.time(),
        )
        return family

    def _calibrations(self) -> Iterator[Metric]:
        labels = ["adapter"]
        depths = GaugeMetricFamily(
            "fathom_calibrated_depth", "Active calibrated depth.", labels=labels
        )
        ages = GaugeMetricFamily(
            "fathom_calibration_age_seconds", "Since the active record was made.", labels=labels
        )
        now = time.time()
        for adapter in self._engine.adapters():
            calibrated = self._engine.calibrated_depth(adapter)
            if calibrated is not None:
                depths.add_metric([adapter.name], calibrated.depth)
                ages.add_metric([adapter.name], now - calibrated.calibrated_s)
        yield depths
        yield ages

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._engine.info.name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._engine.info.name], value)
        return family


def _names(observers: Iterable[Observer]) -> str:
    adapters = Tally(o.request.lora.adapter.name for o in observers if o.request.lora.adapter)
    return ",".join(sorted(adapters))
