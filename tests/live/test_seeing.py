"""What an operator sees of a real server: its metrics beside the dashboard, its traces, its log, its audit.

One server, with everything switched on that is off by default but the texts in the log.
"""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tests.live import promql
from tests.live.operator import Operator
from tests.live.process import ADMIN_KEY, API_KEY, Site, metric, serve

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "fathom.json"
PROMPT = "sesame-of-the-prompt"
TRACE = "0af7651916cd43dd8448eb211c80319c"
LIMIT_S = 60
OUT_OF_RANGE = 99


class Collector:
    """An OpenTelemetry collector on the loopback: an OTLP/HTTP receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.received: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                collector.headers.append({k.lower(): v for k, v in self.headers.items()})
                collector.received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(LIMIT_S)

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class Seen:
    """What is left when traffic has passed and the server has stopped."""

    def __init__(self) -> None:
        self.metrics = ""
        self.audit: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.log = ""
        self.texts: list[str] = []
        """What clients were told."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def seen(site: Site, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Seen:
    directory = tmp_path_factory.mktemp("seeing")
    words = ["--api-key", API_KEY, "--admin-key", ADMIN_KEY, "--log-level", "debug"]
    words += ["--log-format", "json", "--database", f"sqlite:///{directory / 'fathom.db'}"]
    words += ["--data-root", str(site.data), "--max-loras", "2", "--adapter-root", str(site.root)]
    seen = Seen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=ours")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with serve(site, directory / "stderr", *words) as server, Operator(server) as operator:
            traffic(operator, seen)
            seen.metrics = operator.http.get("/metrics").text
            seen.audit = operator.admin.get("/admin/audit").json()["entries"]
        seen.log = server.stderr
    seen.lines = [json.loads(line) for line in seen.log.splitlines()]
    return seen


def traffic(operator: Operator, seen: Seen) -> None:
    """Success, streams, refusals, a client that leaves, administration."""
    body = {"model": "plain@2", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    labels = {"x-request-id": "mine", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    answer = operator.http.post("/v1/completions", json=body, headers=labels)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine"
    seen.texts.append(answer.json()["choices"][0]["text"])
    for model in ("tiny", "head", "dora", "plain"):
        streamed = body | {"model": model, "stream": True, "prompt": PROMPT * 3}
        with operator.http.stream("POST", "/v1/completions", json=streamed) as response:
            assert response.status_code == 200
            assert response.headers["x-request-id"]
            response.read()
    messages = [{"role": "user", "content": PROMPT}]
    chat = {"model": "head", "messages": messages, "max_tokens": 3}
    assert operator.http.post("/v1/chat/completions", json=chat).status_code == 200
    for bad in ({"max_tokens": PROMPT}, {"lora_depth": OUT_OF_RANGE}, {PROMPT: 1}):
        refused = operator.http.post("/v1/completions", json=body | bad)
        assert refused.status_code == 400
        assert refused.headers["x-request-id"]
    lost = operator.http.get("/nowhere", headers={"x-request-id": "lost"})
    assert (lost.status_code, lost.headers["x-request-id"]) == (404, "lost")
    odd = operator.http.get("/nowhere", headers={"x-request-id": "a b"})
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "x-request-id")
    assert odd.headers["x-request-id"] != "a b"
    messages = [{"role": PROMPT, "content": PROMPT}]
    failed = operator.http.post("/v1/chat/completions", json=chat | {"messages": messages})
    assert failed.status_code == 400
    long = body | {"stream": True, "max_tokens": 900}
    with operator.http.stream("POST", "/v1/completions", json=long) as response:
        next(response.iter_lines())
    for _ in range(5000):
        if metric(operator.http, "fathom_requests_aborted_total"):
            break
    administer(operator)


def administer(operator: Operator) -> None:
    admin = operator.admin
    operator.pin(2)
    for version, status in ((1, 200), (9, 404)):
        path = f"/admin/adapters/plain/boundaries/{version}/activate"
        assert admin.post(path).status_code == status
    bad = {"dataset": {"samples": [{"prompt": PROMPT}]}}
    assert admin.post("/admin/adapters/plain/recalibrate", json=bad).status_code == 400
    assert admin.delete("/admin/jobs/none").status_code == 404
    (plain,) = [
        each for each in admin.get("/admin/adapters").json()["adapters"] if each["name"] == "plain"
    ]
    load = {"lora_name": "again", "lora_path": plain["path"]}
    for status in (200, 400):
        assert admin.post("/v1/load_lora_adapter", json=load).status_code == status
    unload = {"lora_name": "again"}
    labels = {"x-request-id": "unloading"}
    for status in (200, 404):
        response = admin.post("/v1/unload_lora_adapter", json=unload, headers=labels)
        assert response.status_code == status
    assert admin.put("/admin/adapters/new", json={"path": "nowhere"}).status_code == 404


# ---------------------------------------------------------------- the dashboard


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def test_every_query_of_the_dashboard_is_answered_by_a_server(
    dashboard: dict[str, Any], seen: Seen
) -> None:
    server = promql.exposed(seen.metrics)
    asked = list(promql.queries(dashboard))
    assert len(asked) > 50
    wrong = {f"{q.panel}: {q.text}": found for q in asked if (found := promql.problems(q, server))}
    assert wrong == {}
    for name, label in promql.variables(dashboard):
        assert all(label in labels for labels in server[name])


def test_the_alerts_of_its_readme_are_answered_too(seen: Seen) -> None:
    text = DASHBOARD.with_name("README.md").read_text(encoding="utf-8")
    alerts = re.findall(r"^\| `(.+ [=>]+ [\d.]+)` \|", text, re.MULTILINE)
    assert len(alerts) == 4
    server = promql.exposed(seen.metrics)
    for alert in alerts:
        assert promql.problems(promql.Query("alert", alert, ""), server) == []


@pytest.mark.parametrize(
    ("query", "legend", "problem"),
    [
        ("sum(rate(vllm:prompt_tokens[5m]))", "", "no metric 'vllm:prompt_tokens'"),
        ("fathom_kv_blocks{adapter='x'}", "", "'fathom_kv_blocks' has no label 'adapter'"),
        ("sum by (cause) (fathom_kv_blocks)", "", "it aggregates by 'cause'"),
        ("histogram_quantile(0.5, sum(rate(fathom_step_seconds_bucket[5m])))", "", "needs 'le'"),
        ("sum(fathom_kv_blocks)", "{{model_name}}", "the legend's 'model_name'"),
        ("1 - (fathom_kv_blocks / nothing)", "", "no metric 'nothing'"),
    ],
)
def test_a_wrong_query_is_found(seen: Seen, query: str, legend: str, problem: str) -> None:
    server = promql.exposed(seen.metrics)
    found = promql.problems(promql.Query("panel", query, legend), server)
    assert any(problem in each for each in found), found


def test_what_is_no_promql_is_found(seen: Seen) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        promql.problems(promql.Query("panel", "sum(rate(x[5m])", ""), {})


def test_the_dashboard_has_what_an_operator_looks_for(dashboard: dict[str, Any]) -> None:
    text = " ".join(query.text for query in promql.queries(dashboard))
    for name in ("fathom_lora_layers_skipped_total", "fathom_calibrated_depth"):
        assert name in text
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == [
        "Traffic", "Latency", "KV and prefix cache", "Adapters and depth", "Calibration", "Errors",
    ]  # fmt: skip
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in dashboard["panels"]]
    cells = {(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)}
    assert len(cells) == sum(w * h for _, _, w, h in places), "panels overlap"


def test_every_figure_of_our_own_is_on_the_dashboard(dashboard: dict[str, Any], seen: Seen) -> None:
    text = " ".join(query.text for query in promql.queries(dashboard))
    families = re.findall(r"^# TYPE (fathom_\w+) ", seen.metrics, re.MULTILINE)
    assert [name for name in families if name not in text] == ["fathom_build_info"]


def test_the_figures_are_those_of_the_traffic(seen: Seen) -> None:
    samples = [
        (sample.name, set(sample.labels.values()), sample.value)
        for family in text_string_to_metric_families(seen.metrics)
        for sample in family.samples
    ]

    def figure(name: str, *labels: str) -> float:
        (value,) = [value for other, has, value in samples if other == name and {*labels} <= has]
        return value

    assert figure("fathom_calibrated_depth", "plain") == 2
    assert figure("fathom_lora_layers_skipped_total", "plain") > 0
    assert figure("fathom_requests_aborted_total", "disconnect") == 1
    assert figure("vllm:request_success_total", "abort") == 1
    assert figure("vllm:request_success_total", "length") == 6
    assert figure("vllm:request_queue_time_seconds_count") == 6
    num_steps = figure("fathom_steps_total")
    assert figure("fathom_step_seconds_count") == num_steps
    assert figure("vllm:iteration_tokens_total_count") == num_steps
    assert figure("fathom_adapters", "device") == 2
    assert figure("fathom_adapter_evictions_total", "device") >= 1


# ---------------------------------------------------------------- traces


def test_a_collector_gets_the_traces(seen: Seen, collector: Collector) -> None:
    spans = collector.spans()
    ours = [span for span in spans if span.trace_id.hex() == TRACE]
    assert sorted(span.name for span in ours) == [
        "POST /v1/completions", "decode", "prefill", "queue", "text_completion plain",
    ]  # fmt: skip
    by_name = {span.name: span for span in ours}
    request = by_name["text_completion plain"]
    attributes = {pair.key: pair.value for pair in request.attributes}
    assert attributes["fathom.lora.depth"].int_value == 2
    assert attributes["fathom.steps"].int_value >= 6
    assert by_name["prefill"].end_time_unix_nano == by_name["decode"].start_time_unix_nano
    assert by_name["decode"].end_time_unix_nano <= request.end_time_unix_nano
    num_requests = sum(span.name.startswith(("text_completion", "chat ")) for span in spans)
    assert num_requests == 7
    assert not [span for span in spans if "/metrics" in span.name]


def test_the_collector_s_own_settings_are_opentelemetry_s(seen: Seen, collector: Collector) -> None:
    assert {headers["x-tenant"] for headers in collector.headers} == {"ours"}
    (resource,) = {
        tuple(sorted((a.key, a.value.string_value) for a in spans.resource.attributes))
        for request in collector.received
        for spans in request.resource_spans
    }
    named = dict(resource)
    assert (named["service.name"], named["deployment.environment.name"]) == ("fathom", "test")


def test_no_span_holds_what_was_said(seen: Seen, collector: Collector) -> None:
    exported = b"".join(request.SerializeToString() for request in collector.received).decode(
        errors="replace"
    )
    for word in (PROMPT, API_KEY, ADMIN_KEY, *seen.texts):
        assert word not in exported


# ---------------------------------------------------------------- the log


def test_no_line_holds_what_was_said(seen: Seen) -> None:
    for word in (PROMPT, API_KEY, ADMIN_KEY, *seen.texts):
        assert word not in seen.log
    assert any(line["level"] == "debug" for line in seen.lines), "the level is the lowest"


def test_every_exchange_has_one_line(seen: Seen) -> None:
    lines = [line for line in seen.lines if line["logger"] == "server.api.exchange"]
    assert [line["path"] for line in lines if line["path"] not in ("/metrics",)].count(
        "/v1/completions"
    ) == 9
    (first,) = [line for line in lines if line["request_id"] == "mine"]
    assert (first["adapter"], first["depth"], first["finish"]) == ("plain", 2, "length")
    assert first["trace_id"] == TRACE
    (lost,) = [line for line in lines if line["request_id"] == "lost"]
    assert (lost["status"], lost["error"]) == (404, "not_found")
    assert {line["level"] for line in lines if line["path"] == "/metrics"} == {"debug"}
    assert [line for line in lines if line.get("finish") == "disconnect"]


# ---------------------------------------------------------------- the audit log


def test_the_audit_log_knows_what_was_done_and_tried(seen: Seen) -> None:
    told = [(e["action"], e["outcome"], e["subject"].partition(":")[0]) for e in seen.audit]
    assert told == [
        ("adapter.load", "refused", "adapter"),
        ("adapter.unload", "refused", "adapter"),
        ("adapter.unload", "ok", "adapter"),
        ("adapter.load", "refused", "adapter"),
        ("adapter.load", "ok", "adapter"),
        ("job.request_cancel", "refused", "job"),
        ("job.create", "refused", "adapter"),
        ("boundary.activate", "refused", "adapter"),
        ("boundary.activate", "ok", "adapter"),
        ("boundary.pin", "ok", "adapter"),
        ("boundary.add", "ok", "boundary"),
    ]
    assert {entry["actor"] for entry in seen.audit} == {"admin"}
    assert [e["request_id"] for e in seen.audit[1:3]] == ["unloading"] * 2
    assert all(entry["request_id"] for entry in seen.audit)
    assert seen.audit[0]["details"] == {"path": "nowhere", "error": "not_found"}
    assert PROMPT not in json.dumps(seen.audit)
