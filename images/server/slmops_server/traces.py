"""One span a request, sent by OTLP over HTTP. Imported only where the environment names a collector.

Everything else is set by OpenTelemetry's own variables too. Spans hold numbers and names, never a word of a prompt or
an answer. They are sent by a thread of the library's: a collector that is slow or away costs spans, no request waits.
"""

import os
import socket
import threading
import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from slmops_server import asgi
from slmops_server.errors import ApiError
from slmops_server.generate import Record
from slmops_server.metrics import PROVIDER, now, operation

EXPORTER, PROTOCOL = "otlp", "http/protobuf"  # the only ones that are built in
FLUSH = 5.0  # seconds for the last spans when the server ends
LONGEST = 256  # characters of a model's name: one that is not served may have millions
W3C = TraceContextTextMapPropagator()


class Traces:
    """Spans of the requests that Generate has ended with. ValueError when a variable makes no sense."""

    def __init__(self) -> None:
        exporter = os.environ.get("OTEL_TRACES_EXPORTER") or EXPORTER
        if EXPORTER not in map(str.strip, exporter.lower().split(",")):
            raise ValueError(f"the exporter is {exporter!r}, which is not {EXPORTER!r}")
        names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        asked = next(filter(None, map(os.environ.get, names)), PROTOCOL)
        if asked != PROTOCOL:
            raise ValueError(f"the protocol is {asked!r}, which is not {PROTOCOL!r}")
        ours = {"service.name": "slmops-server", "service.instance.id": socket.gethostname()}
        theirs = OTELResourceDetector().detect().attributes
        self._provider = TracerProvider(resource=Resource.create({**ours, **theirs}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("slmops_server")

    def ended(self, scope: asgi.Scope, record: Record) -> None:
        """Make the span of a request that is over now."""
        told = {name: asgi.header(scope, name.encode()) for name in W3C.fields}
        parent = W3C.extract({name: value.decode("latin-1") for name, value in told.items() if value is not None})
        name = told_as = operation(record.kind)
        if record.request and record.choices:  # the model is one that is served: clients choose no names of spans
            name += f" {record.request.model}"
        attributes = {"gen_ai.operation.name": told_as, "gen_ai.provider.name": PROVIDER, **_attributes(record)}
        error = record.error
        if error is not None:
            attributes["error.type"] = record.error_type
        end = time.time_ns()
        start = end - int((now() - record.arrival) * 1e9)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=start)
        if error is not None and not _is_clients(error):
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """Send what is left, within FLUSH seconds."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(FLUSH)


def _is_clients(error: Exception) -> bool:
    """As the conventions have it for the side of the server: what is wrong with a request is no error of its span."""
    return isinstance(error, asgi.DisconnectedError) or (isinstance(error, ApiError) and error.status < 500)


def _attributes(record: Record) -> dict[str, AttributeValue]:
    """By OpenTelemetry's conventions for generative AI; the parts of the time have vLLM's names."""
    request = record.request
    if request is None:
        return {}
    told: dict[str, AttributeValue] = {
        "gen_ai.request.model": request.model[:LONGEST],
        "gen_ai.request.stream": request.stream,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
    }
    if request.max_tokens is not None:
        told["gen_ai.request.max_tokens"] = request.max_tokens
    if request.n > 1:
        told["gen_ai.request.choice.count"] = request.n
    done = [(choice, choice.last) for choice in record.choices if choice.last is not None]
    if not done:
        return told
    prompt, answer, cached = record.usage
    begun = min((last for _, last in done), key=lambda last: last.first)
    first = begun.first - record.arrival
    told |= {
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": [choice.reason(last) for choice, last in done],
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": answer,
        "gen_ai.usage.cache_read.input_tokens": cached,
        "gen_ai.latency.time_in_queue": begun.started - record.arrival,
        "gen_ai.latency.time_to_first_token": first,
        "gen_ai.latency.time_in_model_prefill": begun.first - begun.started,
        "gen_ai.latency.time_in_model_decode": max(last.last for _, last in done) - begun.first,
    }
    if request.stream:
        told["gen_ai.response.time_to_first_chunk"] = first
    return told
