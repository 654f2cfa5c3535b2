import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from server_harness import Server, wait_for

Start = Callable[..., Server]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans over HTTP, as a collector does on port 4318."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []

    @property
    def spans(self) -> list[Span]:
        told = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for one in told for r in one.resource_spans for s in r.scope_spans for span in s.spans]

    @property
    def resource(self) -> dict[str, Any]:
        return _plain(ExportTraceServiceRequest.FromString(self.bodies[0]).resource_spans[0].resource.attributes)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        assert self.path == "/v1/traces"
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()


def _plain(attributes: Any) -> dict[str, Any]:
    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        return [value(v) for v in one.array_value.values] if kind == "array_value" else getattr(one, kind)

    told: list[KeyValue] = list(attributes)
    return {one.key: value(one.value) for one in told}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """The one that a server of the test is told of."""
    with Collector() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
        yield made
        made.shutdown()


def end(server: Server) -> None:
    """Ended, a server has sent its last spans."""
    server.terminate()
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log.read_text()


def test_an_answer_is_a_span_of_its_callers_trace(start: Start, collector: Collector) -> None:
    server = start("--drain-grace", "0")
    before = time.time_ns()
    server.http.headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
    whole = server.complete(prompt="The secret printer", top_p=0.9, n=2, temperature=0.5, seed=1).json()
    del server.http.headers["traceparent"]
    server.chat("secret", stream=True, max_tokens=3)
    server.http.headers["traceparent"] = f"00-{TRACE}-{PARENT}-00"  # the caller does not sample this one
    server.complete()
    end(server)
    after = time.time_ns()

    first, second = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert (first.name, first.kind, first.status.code) == (
        "text_completion tiny",
        Span.SPAN_KIND_SERVER,
        Status.STATUS_CODE_UNSET,
    )
    assert before < first.start_time_unix_nano < first.end_time_unix_nano < second.start_time_unix_nano < after
    told = _plain(first.attributes)
    times = {name.rpartition(".")[2]: told.pop(name) for name in list(told) if ".latency." in name}
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "slmops",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": False,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": whole["id"],
        "gen_ai.response.finish_reasons": [choice["finish_reason"] for choice in whole["choices"]],
        "gen_ai.usage.input_tokens": whole["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": whole["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": whole["usage"]["prompt_tokens_details"]["cached_tokens"],
    }
    assert min(times.values()) > 0
    waited = times["time_in_queue"] + times["time_in_model_prefill"]
    assert times["time_to_first_token"] == pytest.approx(waited)
    spent = (first.end_time_unix_nano - first.start_time_unix_nano) / 1e9
    assert waited + times["time_in_model_decode"] < spent

    assert (second.name, second.parent_span_id) == ("chat tiny", b"")
    assert second.trace_id.hex() != TRACE
    told = _plain(second.attributes)
    assert (told["gen_ai.request.stream"], told["gen_ai.usage.output_tokens"]) == (True, 3)
    assert told["gen_ai.response.time_to_first_chunk"] == told["gen_ai.latency.time_to_first_token"]
    assert collector.resource["service.name"] == "slmops-server"
    assert collector.resource["service.instance.id"] == socket.gethostname()
    assert not any(b"secret" in body for body in collector.bodies)


def test_a_span_tells_what_failed(start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tickets")
    server = start("--drain-grace", "0", "--slots", "1")
    assert server.complete(prompt=[5] * 512).status_code == 400
    assert server.complete(model="o" * 100_000).status_code == 404
    assert server.http.post("/v1/chat/completions", content=b"{").status_code == 400
    long = {"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 8}
    with server.http.stream("POST", "/v1/completions", json=long) as answer:
        next(answer.iter_lines())
    wait_for(lambda: server.idle, "the client that left is forgotten")
    with server.http.stream("POST", "/v1/completions", json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(server.engine_pid or 0, signal.SIGKILL)
        assert "engine_restarted" in "".join(lines)
    end(server)
    spans = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert [(s.name, _plain(s.attributes)["error.type"], s.status.code) for s in spans] == [
        ("text_completion", "context_length_exceeded", Status.STATUS_CODE_UNSET),
        ("text_completion", "model_not_found", Status.STATUS_CODE_UNSET),
        ("chat", "invalid_json", Status.STATUS_CODE_UNSET),
        ("text_completion tiny", "client_left", Status.STATUS_CODE_UNSET),
        ("text_completion tiny", "engine_restarted", Status.STATUS_CODE_ERROR),
    ]
    assert _plain(spans[0].attributes)["gen_ai.request.model"] == "tiny"
    assert _plain(spans[1].attributes)["gen_ai.request.model"] == "o" * 256
    assert collector.resource["service.name"] == "tickets"


@pytest.mark.parametrize("listens", [False, True], ids=["gone", "silent"])
def test_a_dead_collector_slows_and_breaks_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen(1)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")  # sends, or tries to, from the first request on
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
        server = start("--drain-grace", "0")
        begin = time.monotonic()
        assert {server.complete().status_code for _ in range(20)} == {200}
        assert time.monotonic() - begin < 20  # one attempt takes the 60 seconds above
        end(server)
        assert "Queue full, dropping Span" in server.log.read_text()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "the protocol is 'grpc', which is not 'http/protobuf'"),
        ("OTEL_TRACES_EXPORTER", "zipkin, console", "the exporter is 'zipkin, console', which is not 'otlp'"),
        ("OTEL_TRACES_EXPORTER", "none", ""),
    ],
)
def test_another_protocol_or_exporter_is_no_traces_and_a_sentence_unless_none_is_asked_for(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    server = start("--drain-grace", "0")
    assert server.complete().status_code == 200
    end(server)
    assert re.findall("none are sent problem=(.*)", server.log.read_text()) == [problem][: bool(problem)]
    assert collector.bodies == []


def test_traces_are_sent_where_otlp_is_one_of_the_exporters(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console,otlp")
    server = start("--drain-grace", "0")
    server.complete()
    end(server)
    assert len(collector.spans) == 1


def test_without_a_collector_nothing_of_it_is_read() -> None:
    program = "import sys, slmops_server.main; print([name for name in sys.modules if name.startswith('opentel')])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
