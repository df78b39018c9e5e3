"""Traces, as an exporter in this process gets them; and nothing of them where they are off."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from types import FrameType
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.api.app import create_app
from server.api.tracing import Tracing
from server.config import ConfigError, Settings
from server.environment import traces_endpoint
from server.errors import GenerationError, QueueFull
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

BODY = {"model": "tuned", "prompt": "sesame", "max_tokens": 4, "seed": 7}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest.fixture
async def traced(
    engine: FakeEngine, settings: Settings, exporter: InMemorySpanExporter
) -> AsyncIterator[httpx.AsyncClient]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(settings, engine, Tracing(provider))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://fathom") as client:
        yield client
    provider.shutdown()


def named(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    (span,) = [span for span in spans if span.name == name]
    return span


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_with_its_phases_below_it(
    traced: httpx.AsyncClient, exporter: InMemorySpanExporter, stream: bool
) -> None:
    response = await traced.post("/v1/completions", json=BODY | {"stream": stream})
    assert response.status_code == 200
    spans = exporter.get_finished_spans()
    assert {span.name for span in spans} == {
        "POST /v1/completions", "text_completion tuned", "queue", "prefill", "decode",
    }  # fmt: skip
    http, request = named(spans, "POST /v1/completions"), named(spans, "text_completion tuned")
    assert (http.kind, http.parent) == (SpanKind.SERVER, None)
    assert parent_of(request) == http.context.span_id
    queue, prefill, decode = (named(spans, name) for name in ("queue", "prefill", "decode"))
    for phase in (queue, prefill, decode):
        assert parent_of(phase) == request.context.span_id
    assert len({span.context.trace_id for span in spans}) == 1

    assert times(queue)[0] == times(request)[0]
    assert times(queue)[1] == times(prefill)[0]
    assert times(prefill)[1] == times(decode)[0]
    assert times(decode)[1] <= times(request)[1] <= times(http)[1]
    assert times(http)[0] <= times(request)[0]

    told = dict(request.attributes or {})
    assert told.pop("gen_ai.response.id").startswith("cmpl-")
    assert told.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "fathom",
        "gen_ai.request.model": "tuned",
        "gen_ai.response.model": "tuned",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "fathom.lora.adapter": "tuned",
        "fathom.lora.depth": 7,
        "fathom.lora.effective_depth": 7,
        "fathom.lora.source": "calibrated",
        "fathom.lora.boundary_version": 3,
        "fathom.steps": 5,
    }
    assert dict(prefill.attributes or {}) == {
        "fathom.steps": 2, "fathom.first_step": 1,
        "fathom.cached_tokens": 3, "fathom.computed_tokens": 3,
    }  # fmt: skip
    assert dict(decode.attributes or {}) == {
        "fathom.steps": 3, "fathom.last_step": 5, "gen_ai.usage.output_tokens": 4,
    }  # fmt: skip
    assert all(span.status.status_code is StatusCode.UNSET for span in spans)


async def test_the_caller_s_trace_goes_on(
    traced: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    await traced.post("/v1/completions", json=BODY, headers=headers)
    spans = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    assert parent_of(named(spans, "POST /v1/completions")) == int(PARENT, 16)
    exporter.clear()
    await traced.post("/v1/completions", json=BODY, headers={"traceparent": "00-nonsense"})
    http = named(exporter.get_finished_spans(), "POST /v1/completions")
    assert http.parent is None
    exporter.clear()
    unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    await traced.post("/v1/completions", json=BODY, headers=unsampled)
    assert exporter.get_finished_spans() == (), "the caller does not sample it"


async def test_every_prompt_is_a_span_and_a_chat_is_a_chat(
    traced: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await traced.post("/v1/completions", json=BODY | {"prompt": ["a", "b", "c"], "model": "base"})
    names = [span.name for span in exporter.get_finished_spans()]
    assert names.count("text_completion base") == 3
    exporter.clear()
    messages = [{"role": "user", "content": "sesame"}]
    body = {"model": "plain@2", "messages": messages, "n": 2, "max_tokens": 2}
    await traced.post("/v1/chat/completions", json=body)
    chat = named(exporter.get_finished_spans(), "chat plain")
    assert chat.attributes is not None
    assert chat.attributes["gen_ai.request.choice.count"] == 2
    assert chat.attributes["gen_ai.response.finish_reasons"] == ("length", "length")


async def test_failures_are_errors_with_their_kind(
    traced: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    engine.fail_after, engine.error = 1, GenerationError("sesame")
    await traced.post("/v1/completions", json=BODY)
    spans = exporter.get_finished_spans()
    request = named(spans, "text_completion tuned")
    assert (request.attributes or {})["error.type"] == "generation_failed"
    assert request.status.status_code is StatusCode.ERROR
    assert (named(spans, "POST /v1/completions").attributes or {})[
        "http.response.status_code"
    ] == 500
    exporter.clear()
    engine.refusal = QueueFull("full")
    await traced.post("/v1/completions", json=BODY)
    spans = exporter.get_finished_spans()
    assert (named(spans, "text_completion tuned").attributes or {})["error.type"] == "queue_full"
    assert "prefill" not in {span.name for span in spans}
    exporter.clear()
    await traced.post("/v1/completions", json=BODY | {"max_tokens": 0})
    (http,) = exporter.get_finished_spans()
    assert (http.attributes or {})["http.response.status_code"] == 400


async def test_no_span_holds_what_was_said(
    traced: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    await traced.post("/v1/completions", json=BODY | {"stop": ["sesame"]})
    engine.fail_after, engine.error = 1, GenerationError("sesame")
    await traced.post("/v1/completions", json=BODY)
    engine.fail_after, engine.bug = None, RuntimeError("sesame")
    await traced.post("/v1/completions", json=BODY)
    spans = exporter.get_finished_spans()
    assert len([span for span in spans if span.name == "text_completion tuned"]) == 3
    assert "sesame" not in "".join(span.to_json() for span in spans)


async def test_probes_leave_no_trace(
    traced: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert (await traced.get(path)).status_code == 200
    assert exporter.get_finished_spans() == ()
    assert (await traced.get("/v1/models")).status_code == 200
    assert len(exporter.get_finished_spans()) == 1


class Calls:
    """Counts calls into what makes spans, on this thread."""

    PARTS = ("opentelemetry/sdk", "opentelemetry/trace", "opentelemetry/exporter", "api/tracing.py")

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and any(part in frame.f_code.co_filename for part in self.PARTS):
            self.num += 1


async def num_calls(client: httpx.AsyncClient) -> int:
    calls = Calls()
    sys.setprofile(calls)
    try:
        for stream in (False, True):
            response = await client.post("/v1/completions", json=BODY | {"stream": stream})
            assert response.status_code == 200
    finally:
        sys.setprofile(None)
    return calls.num


async def test_nothing_is_called_when_traces_are_off(
    client: httpx.AsyncClient, traced: httpx.AsyncClient
) -> None:
    assert await num_calls(client) == 0
    assert await num_calls(traced) > 0, "the control sees them"


def test_nothing_is_imported_when_traces_are_off() -> None:
    """One process, because it takes seconds to import the rest; at its end it is the control."""
    program = """
import os, sys
from server import serve
for endpoint in ("", "http://127.0.0.1:9"):
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
    print(serve.open_tracing() is not None, *(name in sys.modules for name in sys.argv[1:]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, "server.api.tracing", "opentelemetry.sdk"],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == ["False False False", "True True True"], ran.stderr


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "x"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/in",
            },
            "http://t/in",
        ),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
    ],
)
def test_opentelemetry_s_own_variables_decide(environ: dict[str, str], endpoint: str) -> None:
    assert traces_endpoint(environ) == endpoint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_what_is_not_served_is_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        traces_endpoint({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"} | {key: value})


def test_without_the_extra_the_refusal_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"fathom-lora\[otel\]"):
        Tracing.to("http://127.0.0.1:9/v1/traces")
