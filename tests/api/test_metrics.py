"""What Prometheus scrapes: vLLM's names as vLLM has them, ours, and a bound on how many there are."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.metrics import depth_bounds, one_two_five
from server.config import Settings
from server.engine.protocol import LayerCount
from server.engine.request import AdapterRef, CalibratedDepth
from server.errors import GenerationError, QueueFull
from tests.api.asgi import Exchange
from tests.api.conftest import MakeClient
from tests.api.fake_engine import FakeEngine
from tests.api.test_routes import figure, scrape

pytestmark = pytest.mark.anyio

BODY = {"model": "tuned", "prompt": "hello", "max_tokens": 4}
ENGINE = {"model_name", "engine"}
TTFT = (
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
    " 160.0 640.0 2560.0 +Inf"
)
ITL = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 +Inf"
REQUEST = (
    "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0"
    " 1920.0 7680.0 +Inf"
)
TOKENS = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 +Inf"

# As the stat logger of vLLM's V1 engine declares them (read in November 2026): name, type, labels beside
# `le`, and buckets where they are fixed or follow from a context of 512 tokens.
VLLM: list[tuple[str, str, set[str], str | None]] = [
    ("num_requests_running", "gauge", ENGINE, None),
    ("num_requests_waiting", "gauge", ENGINE, None),
    ("kv_cache_usage_perc", "gauge", ENGINE, None),
    ("prefix_cache_queries", "counter", ENGINE, None),
    ("prefix_cache_hits", "counter", ENGINE, None),
    ("num_preemptions", "counter", ENGINE, None),
    ("prompt_tokens", "counter", ENGINE, None),
    ("generation_tokens", "counter", ENGINE, None),
    ("request_success", "counter", ENGINE | {"finished_reason"}, None),
    ("request_prompt_tokens", "histogram", ENGINE, TOKENS),
    ("request_generation_tokens", "histogram", ENGINE, TOKENS),
    ("request_params_max_tokens", "histogram", ENGINE, TOKENS),
    ("request_params_n", "histogram", ENGINE, "1.0 2.0 5.0 10.0 20.0 +Inf"),
    ("iteration_tokens_total", "histogram", ENGINE, None),
    ("time_to_first_token_seconds", "histogram", ENGINE, TTFT),
    ("inter_token_latency_seconds", "histogram", ENGINE, ITL),
    ("e2e_request_latency_seconds", "histogram", ENGINE, REQUEST),
    ("request_queue_time_seconds", "histogram", ENGINE, REQUEST),
    ("request_inference_time_seconds", "histogram", ENGINE, REQUEST),
    ("request_prefill_time_seconds", "histogram", ENGINE, REQUEST),
    ("request_decode_time_seconds", "histogram", ENGINE, REQUEST),
    (
        "lora_requests_info",
        "gauge",
        {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
        None,
    ),
]


@pytest.mark.parametrize(("name", "kind", "labels", "buckets"), VLLM)
async def test_vllm_s_metrics_are_as_vllm_has_them(
    client: httpx.AsyncClient, name: str, kind: str, labels: set[str], buckets: str | None
) -> None:
    text = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    family = families[f"vllm:{name}"]
    assert family.type == kind
    assert {frozenset(s.labels) - {"le"} for s in family.samples} == {frozenset(labels)}
    if buckets is not None:
        bounds = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket")]
        assert " ".join(bounds) == buckets


async def test_a_gateway_reads_the_size_of_the_cache(client: httpx.AsyncClient) -> None:
    samples = await scrape(client)
    ((_, labels),) = [key for key in samples if key[0] == "vllm:cache_config_info"]
    assert {("block_size", "16"), ("num_gpu_blocks", "100")} <= labels


async def test_every_way_to_end_is_counted(make_client: MakeClient, engine: FakeEngine) -> None:
    client = make_client(engine, Settings(request_timeout_s=0.05))
    await client.post("/v1/completions", json=BODY | {"n": 2})
    engine.hold_after = 1
    await client.post("/v1/completions", json=BODY | {"n": 2})
    engine.hold_after, engine.fail_after = None, 1
    engine.error = GenerationError("it broke")
    await client.post("/v1/completions", json=BODY | {"n": 3})
    engine.fail_after, engine.refusal = None, QueueFull("full")
    await client.post("/v1/completions", json=BODY)
    samples = await scrape(client)
    name = "vllm:request_success_total"
    ends = {"length": 2, "abort": 2, "error": 3, "stop": 0}
    for reason, num in ends.items():
        assert figure(samples, name, finished_reason=reason) == num, reason
    causes = {"timeout": 1, "generation_failed": 1, "queue_full": 1, "disconnect": 0}
    for cause, num in causes.items():
        assert figure(samples, "fathom_requests_aborted_total", cause=cause) == num, cause
    assert figure(samples, "vllm:e2e_request_latency_seconds_count") == 1


async def test_the_parts_of_a_request_s_time_add_up(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.scheduled_s = 0.25  # after its arrival
    await client.post("/v1/completions", json=BODY)
    samples = await scrape(client)
    parts = {
        part: figure(samples, f"vllm:request_{part}_time_seconds_sum")
        for part in ("queue", "prefill", "decode", "inference")
    }
    assert parts["queue"] == pytest.approx(0.25)
    whole = figure(samples, "vllm:e2e_request_latency_seconds_sum")
    assert parts["queue"] + parts["inference"] == pytest.approx(whole)
    to_first = figure(samples, "vllm:time_to_first_token_seconds_sum")
    assert parts["queue"] + parts["prefill"] == pytest.approx(to_first)
    between = figure(samples, "vllm:inter_token_latency_seconds_sum")
    assert parts["decode"] == pytest.approx(between)


async def test_depths_are_counted_by_who_chose_them(client: httpx.AsyncClient) -> None:
    for model in ("tuned", "tuned@3", "tuned@3", "plain@full", "base"):
        await client.post("/v1/completions", json=BODY | {"model": model})
    samples = await scrape(client)
    name = "fathom_request_depth"
    for source, num, total in (
        ("request", 2, 6), ("calibrated", 1, 7), ("full", 1, 10), ("base", 1, 0),
    ):  # fmt: skip
        assert figure(samples, f"{name}_count", source=source) == num
        assert figure(samples, f"{name}_sum", source=source) == total
    assert figure(samples, f"{name}_bucket", source="request", le="2.0") == 0
    assert figure(samples, f"{name}_bucket", source="request", le="3.0") == 2


async def test_adapters_are_counted_by_place(client: httpx.AsyncClient) -> None:
    samples = await scrape(client)
    for name, place, value in (
        ("fathom_adapters", "device", 1), ("fathom_adapters", "host", 2),
        ("fathom_adapter_loads_total", "device", 4), ("fathom_adapter_loads_total", "host", 5),
        ("fathom_adapter_evictions_total", "device", 3),
    ):  # fmt: skip
        assert figure(samples, name, place=place) == value
    assert figure(samples, "fathom_adapters_known") == 2


async def test_a_client_that_leaves_is_an_abort(engine: FakeEngine, settings: Settings) -> None:
    from server.api.app import create_app

    app = create_app(settings, engine)
    engine.hold_after = 1
    exchange = Exchange(app, "/v1/completions", BODY | {"stream": True})
    await exchange.event()
    exchange.hang_up()
    await exchange.done
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://fathom"
    ) as client:
        samples = await scrape(client)
    assert figure(samples, "fathom_requests_aborted_total", cause="disconnect") == 1
    assert figure(samples, "vllm:request_success_total", finished_reason="abort") == 1


NUM_ADAPTERS = 10_000
MAX_SAMPLES = 2000


class Crowd(FakeEngine):
    """Ten thousand adapters, all of which ran and are calibrated."""

    num_ran = NUM_ADAPTERS

    def layer_counts(self) -> Mapping[str, LayerCount]:
        # Not in the order of their names: who ran first has a series.
        return {f"a{n * 7919 % NUM_ADAPTERS}": LayerCount(1, 2) for n in range(self.num_ran)}

    def adapters(self) -> list[AdapterRef]:
        one = self._ref("a", Path("/a"), 12)
        return [replace(one, name=f"a{n}", digest=f"sha256:{n}") for n in range(NUM_ADAPTERS)]

    def calibrated_depth(self, adapter: AdapterRef) -> CalibratedDepth | None:
        return CalibratedDepth(4, 1, 0.0)


async def samples_of(client: httpx.AsyncClient) -> dict[tuple[str, str], float]:
    """Values by name and adapter."""
    return {
        (name, dict(labels).get("adapter", "")): value
        for (name, labels), value in (await scrape(client)).items()
    }


@pytest.fixture
def crowd(engine: FakeEngine) -> Crowd:
    return Crowd(engine.tokenizer)


async def test_ten_thousand_adapters_are_few_series(crowd: Crowd, make_client: MakeClient) -> None:
    bounded = make_client(crowd, Settings())
    assert len(await scrape(bounded)) < MAX_SAMPLES
    samples = await samples_of(bounded)
    for name, each in (
        ("fathom_lora_layers_applied_total", 1),
        ("fathom_lora_layers_skipped_total", 2),
    ):
        series = {key: value for key, value in samples.items() if key[0] == name}
        assert len(series) == 257
        assert sum(series.values()) == each * NUM_ADAPTERS
        assert series[name, ":others"] == each * (NUM_ADAPTERS - 256)
    depths = [adapter for name, adapter in samples if name == "fathom_calibrated_depth"]
    assert len(depths) == 256
    assert set(depths) == {a for n, a in samples if n == "fathom_lora_layers_applied_total"} - {
        ":others"
    }
    assert samples["fathom_calibrated_adapters", ""] == NUM_ADAPTERS
    unbounded = make_client(crowd, Settings(max_metric_adapters=NUM_ADAPTERS))
    assert len(await scrape(unbounded)) > 4 * NUM_ADAPTERS, "the control has no bound"


async def test_no_counter_falls_as_adapters_come(crowd: Crowd, make_client: MakeClient) -> None:
    client = make_client(crowd, Settings(max_metric_adapters=3))
    before: dict[tuple[str, str], float] = {}
    for crowd.num_ran in (1, 3, 4, 50):
        now = await samples_of(client)
        counters = {key: now[key] for key in now if key[0].startswith("fathom_lora_layers")}
        assert all(counters[key] >= value for key, value in before.items())
        before = counters
    assert len(before) == 2 * 4


async def test_one_label_names_so_many_adapters(crowd: Crowd, settings: Settings) -> None:
    from server.api.metrics import Metrics
    from server.api.request_metrics import RequestCollector
    from server.engine.request import LoraSelection, Request, SamplingParams

    metrics = Metrics(crowd.info, settings)
    for adapter in crowd.adapters():
        lora = LoraSelection(adapter, 4, 12, "request")
        metrics.observe(Request(f"r-{adapter.name}", (1,), SamplingParams(1), lora))
    families: dict[str, Any] = {f.name: f for f in RequestCollector(metrics, "b", 8).collect()}
    (sample,) = families["vllm:lora_requests_info"].samples
    assert sample.labels["running_lora_adapters"] == ""
    assert len(sample.labels["waiting_lora_adapters"].split(",")) == 256


@pytest.mark.parametrize(
    ("num_layers", "bounds"),
    [
        (1, (0, 1)),
        (12, tuple(range(13))),
        (16, tuple(range(17))),
        (32, tuple(range(0, 33, 2))),
        (33, (*range(0, 33, 3), 33)),
        (80, tuple(range(0, 81, 5))),
    ],
)
def test_depths_have_few_ranges(num_layers: int, bounds: tuple[int, ...]) -> None:
    assert depth_bounds(num_layers) == bounds
    assert len(bounds) <= 17


def test_token_ranges_end_with_the_context() -> None:
    assert one_two_five(1) == (1,)
    assert one_two_five(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)
    assert one_two_five(1000)[-1] == 1000
