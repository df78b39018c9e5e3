"""Traces: an HTTP request, and below it the wait, the prefill and the decode of each engine request.

Off unless OpenTelemetry's own variables name a collector; then only is its SDK imported, and without it
no code here runs at all. FastAPI makes the span of the HTTP request and takes the caller's `traceparent`.
The spans below it are made when the request has ended, from times that were taken anyway, so a token
costs the same with traces as without.

Attributes are those of OpenTelemetry's conventions for generative AI, and `fathom.*` where it has none.
No span holds a prompt, a completion or a key.
"""

import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context, trace

from server import __version__
from server.api.exchange import PROBES
from server.api.observation import Observation
from server.config import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Tracing:
    """Makes the spans of engine requests, and ends with the server."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fathom", __version__)

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Export over OTLP/HTTP. Raises ConfigError where the extra is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"OpenTelemetry's variables ask for traces to {endpoint}, and its SDK is not installed"
                f" ({error}): pip install 'fathom-lora[otel]', or OTEL_SDK_DISABLED=true"
            ) from error
        named = OTELResourceDetector().detect().attributes
        service = {} if SERVICE_NAME in named else {SERVICE_NAME: "fathom"}
        resource = Resource.create({"service.version": __version__, **service})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    @property
    def telemetry(self) -> TelemetryConfig:
        """What FastAPI needs for the spans of HTTP requests; probes have none."""

        def is_probe(scope: MutableMapping[str, Any]) -> bool:
            return scope.get("path") in PROBES

        return {
            "tracer_provider": self._provider,
            "tracing": True,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": is_probe,
        }

    @staticmethod
    def parent() -> context.Context:
        """The HTTP request's span, asked for while it is handled."""
        return context.get_current()

    @staticmethod
    def trace_id() -> str | None:
        """Of the HTTP request that is being handled, as a log names it; None for a probe."""
        found = trace.get_current_span().get_span_context()
        return trace.format_trace_id(found.trace_id) if found.is_valid else None

    def record(self, seen: Observation, parent: context.Context, base: str) -> None:
        """Make the spans of an engine request that has ended.

        base: the base model's name.
        """
        clock = _Clock()
        attributes = _attributes(seen, base)
        operation = attributes["gen_ai.operation.name"]
        span = self._tracer.start_span(
            f"{operation} {attributes['gen_ai.request.model']}",
            parent,
            attributes=attributes,
            start_time=clock.ns(seen.request.arrival_s),
        )
        if seen.how != "success":
            span.set_attribute("error.type", seen.cause)
            span.set_status(trace.StatusCode.ERROR)
        if span.is_recording():
            below = trace.set_span_in_context(span, parent)
            for name, began_s, ended_s, phase in _phases(seen):
                child = self._tracer.start_span(
                    name, below, attributes=phase, start_time=clock.ns(began_s)
                )
                child.end(clock.ns(ended_s))
        span.end(clock.ns(seen.ended_s))

    def shutdown(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


class _Clock:
    """Monotonic seconds to Unix nanoseconds, as of now."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, monotonic_s: float) -> int:
        return self._offset_ns + int(monotonic_s * 1e9)


def _phases(seen: Observation) -> list[tuple[str, float, float, dict[str, Any]]]:
    """Name, begin, end and attributes of what an engine request went through."""
    arrival_s, last = seen.request.arrival_s, seen.last
    if last is None or not seen.scheduled_s:
        return [("queue", arrival_s, seen.ended_s, {})]
    prefill_end_s = seen.first_token_s or seen.ended_s
    prefill_end = seen.first_token_step or last.step
    phases: list[tuple[str, float, float, dict[str, Any]]] = [
        ("queue", arrival_s, seen.scheduled_s, {}),
        (
            "prefill",
            seen.scheduled_s,
            prefill_end_s,
            {
                "fathom.steps": prefill_end - last.first_step + 1,
                "fathom.first_step": last.first_step,
                "fathom.cached_tokens": last.num_cached_tokens,
                "fathom.computed_tokens": last.num_prompt_tokens - last.num_cached_tokens,
            },
        ),
    ]
    if seen.first_token_s:
        decode = {
            "fathom.steps": last.step - prefill_end,
            "fathom.last_step": last.step,
            "gen_ai.usage.output_tokens": last.num_output_tokens,
        }
        phases.append(("decode", prefill_end_s, seen.last_token_s, decode))
    return phases


def _attributes(seen: Observation, base: str) -> dict[str, Any]:
    request, last = seen.request, seen.last
    sampling, lora = request.sampling, request.lora
    response_id = request.id.rpartition("-")[0]
    model = base if lora.adapter is None else lora.adapter.name
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat" if response_id.startswith("chat") else "text_completion",
        "gen_ai.provider.name": "fathom",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": response_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "fathom.lora.depth": lora.depth,
        "fathom.lora.effective_depth": lora.effective_depth,
        "fathom.lora.source": lora.source,
        "fathom.steps": seen.num_steps,
    }
    if lora.adapter is not None:
        attributes["fathom.lora.adapter"] = lora.adapter.name
    if lora.boundary_version is not None:
        attributes["fathom.lora.boundary_version"] = lora.boundary_version
    if sampling.n > 1:
        attributes["gen_ai.request.choice.count"] = sampling.n
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if last is not None:
        attributes["gen_ai.usage.output_tokens"] = last.num_output_tokens
        attributes["gen_ai.usage.cache_read.input_tokens"] = last.num_cached_tokens
        attributes["gen_ai.response.finish_reasons"] = list(seen.finish_reasons)
    if seen.first_token_s:
        to_first_s = seen.first_token_s - request.arrival_s
        attributes["gen_ai.response.time_to_first_chunk"] = to_first_s
    return attributes
