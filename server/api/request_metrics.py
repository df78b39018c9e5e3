"""Families of what was counted request by request, read when somebody asks."""

import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.api.families import Families
from server.api.metrics import Metrics
from server.api.observation import Observation

MAX_NAMES = 256
"""Adapters that `vllm:lora_requests_info` names in one label."""


class RequestCollector(Collector):
    """Reads `Metrics`; on whichever thread is asked."""

    def __init__(self, metrics: Metrics, model_name: str, max_loras: int) -> None:
        self._metrics = metrics
        self._families = Families(model_name)
        self._max_loras = max_loras

    def collect(self) -> Iterator[Metric]:
        """One family a figure."""
        seen, make = self._metrics, self._families
        for name, text, distribution in (
            ("time_to_first_token_seconds", "Seconds to the first token.", seen.to_first_token),
            ("inter_token_latency_seconds", "Seconds between outputs.", seen.between_tokens),
            ("e2e_request_latency_seconds", "Seconds from arrival to end.", seen.of_a_request),
            ("request_queue_time_seconds", "Seconds to the first step.", seen.in_queue),
            (
                "request_prefill_time_seconds",
                "Seconds from the first step to the first token.",
                seen.in_prefill,
            ),
            (
                "request_decode_time_seconds",
                "Seconds from the first token to the last.",
                seen.in_decode,
            ),
            (
                "request_inference_time_seconds",
                "Seconds from the first step to the end.",
                seen.in_inference,
            ),
            ("request_prompt_tokens", "Tokens of a prompt.", seen.num_prompt_tokens),
            (
                "request_generation_tokens",
                "Tokens generated for a request.",
                seen.num_generation_tokens,
            ),
            ("request_params_max_tokens", "Tokens allowed to a sequence.", seen.max_tokens),
            ("request_params_n", "Sequences of a request.", seen.num_sequences),
        ):
            yield make.histogram(f"vllm:{name}", text, distribution)
        yield make.counters(
            "vllm:request_success", "Sequences that ended.", "finished_reason", dict(seen.finished)
        )
        yield make.counters(
            "fathom_requests_aborted", "Requests that ended early.", "cause", dict(seen.aborted)
        )
        yield make.histograms(
            "fathom_request_depth",
            "Effective depths of requests, by who chose them.",
            "source",
            seen.depths,
        )
        yield self._lora_requests()

    def _lora_requests(self) -> Metric:
        """vLLM's way to tell a gateway which adapters are busy: names in labels, time as value.

        Waiting means that no output has come yet.
        """
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running stats on LoRA requests.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        busy = list(self._metrics.in_flight.values())
        family.add_metric(
            [
                str(self._max_loras),
                _names(seen for seen in busy if seen.last is not None),
                _names(seen for seen in busy if seen.last is None),
            ],
            time.time(),
        )
        return family


def _names(observations: Iterable[Observation]) -> str:
    adapters = {o.request.lora.adapter.name for o in observations if o.request.lora.adapter}
    return ",".join(sorted(adapters)[:MAX_NAMES])
