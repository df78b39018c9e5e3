"""What clients feel, counted request by request.

Names, types, labels and buckets are vLLM's where the meaning is the same, so that gateways and
dashboards made for it work, and `fathom_` where it is ours. Latencies are the event loop's: they include
queues and hand-over. `request_metrics` makes families of it, `engine_metrics` of what the engine counts.
"""

from collections import Counter
from typing import get_args

from server.api.observation import GAVE_UP, Observation
from server.config import Settings
from server.engine.distribution import Distribution
from server.engine.protocol import ModelInfo
from server.engine.request import DepthSource, Request

TO_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
OF_A_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
NUM_SEQUENCES = (1, 2, 5, 10, 20)
MAX_DEPTHS = 17
"""Ranges of depths at most; a model with more layers has several depths in one."""


class Metrics:
    """What one server has counted."""

    def __init__(self, info: ModelInfo, settings: Settings) -> None:
        self.in_flight: dict[str, Observation] = {}
        self.to_first_token = Distribution(TO_FIRST_TOKEN)
        self.between_tokens = Distribution(BETWEEN_TOKENS)
        self.of_a_request = Distribution(OF_A_REQUEST)
        self.in_queue = Distribution(OF_A_REQUEST)
        self.in_prefill = Distribution(OF_A_REQUEST)
        self.in_decode = Distribution(OF_A_REQUEST)
        self.in_inference = Distribution(OF_A_REQUEST)
        tokens = one_two_five(info.max_model_len)
        self.num_prompt_tokens = Distribution(tokens)
        self.num_generation_tokens = Distribution(tokens)
        self.max_tokens = Distribution(tokens)
        self.num_sequences = Distribution(NUM_SEQUENCES)
        self.finished: Counter[str] = Counter(
            dict.fromkeys(("stop", "length", "abort", "error"), 0)
        )
        """Sequences by how they ended."""
        self.aborted: Counter[str] = Counter(dict.fromkeys(GAVE_UP, 0))
        """Requests that ended early, by cause: error codes, which are the code's own words."""
        depths = depth_bounds(info.num_layers)
        self.depths: dict[str, Distribution] = {
            source: Distribution(depths) for source in get_args(DepthSource)
        }
        """Effective depths of requests, by who chose them."""
        self.requests: Counter[str] = Counter()
        """By adapter name, of those that were accepted."""
        self._keeps_text = settings.log_prompts

    def observe(self, request: Request) -> Observation:
        """Follow one engine request; its owner tells what happens, and at last `ended`."""
        observation = Observation(
            request, self.to_first_token, self.between_tokens, keeps_text=self._keeps_text
        )
        self.in_flight[request.id] = observation
        self.depths[request.lora.source].observe(request.lora.effective_depth)
        if request.lora.adapter is not None:
            self.requests[request.lora.adapter.name] += 1
        return observation

    def running(self) -> Counter[str]:
        """Requests that have not ended, by adapter name."""
        adapters = (seen.request.lora.adapter for seen in list(self.in_flight.values()))
        return Counter(adapter.name for adapter in adapters if adapter is not None)

    def ended(self, seen: Observation, cause: str) -> None:
        """Count a request that nobody follows any more."""
        seen.end(cause)
        self.in_flight.pop(seen.request.id, None)
        how = seen.how
        if how != "success":
            self.aborted[cause] += 1
        if seen.last is None and how == "error":
            return  # it was refused, and never was the engine's
        by_themselves = [reason for reason in seen.finish_reasons if reason in ("stop", "length")]
        self.finished.update(by_themselves)
        if how != "success":
            self.finished[how] += seen.request.sampling.n - len(by_themselves)
            return
        assert seen.last is not None
        sampling, arrival_s = seen.request.sampling, seen.request.arrival_s
        self.of_a_request.observe(seen.ended_s - arrival_s)
        self.num_prompt_tokens.observe(seen.last.num_prompt_tokens)
        self.num_generation_tokens.observe(seen.last.num_output_tokens)
        self.max_tokens.observe(sampling.max_tokens)
        self.num_sequences.observe(sampling.n)
        if seen.scheduled_s:
            self.in_queue.observe(seen.scheduled_s - arrival_s)
            self.in_inference.observe(seen.ended_s - seen.scheduled_s)
            if seen.first_token_s:
                self.in_prefill.observe(seen.first_token_s - seen.scheduled_s)
                self.in_decode.observe(seen.last_token_s - seen.first_token_s)


def one_two_five(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    bounds = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= most)


def depth_bounds(num_layers: int) -> tuple[int, ...]:
    """0, the base, and steps up to every layer: each depth by itself where they are few."""
    width = -(-num_layers // (MAX_DEPTHS - 1))
    return (*range(0, num_layers, width), num_layers)
