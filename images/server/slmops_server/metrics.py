"""Metrics in the names that tools already read: vllm:*, gen_ai_server_*, and a few of our own."""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from slmops_server.engines.base import STEP_SIZES
from slmops_server.errors import ApiError
from slmops_server.stream import Delta
from slmops_server.supervisor import Supervisor

TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# small models answer in milliseconds: finer steps below the standard ones, which all stay
ITL_FINE = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, *ITL)
E2E_FINE = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, *E2E)
OTEL_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
OTEL_TTFT = TTFT[:16]
OTEL_TPOT = ITL[:13]


BLOCK = 16  # tokens; vLLM's own, by which routers cut prompts up
PROVIDER = "slmops"  # gen_ai.provider.name
CLIENT_LEFT = 499  # nginx's number for a client that did not wait


def _steps(limit: int) -> list[float]:
    """1, 2, 5, 10, ... up to the limit."""
    return [float(d * 10**e) for e in range(8) for d in (1, 2, 5) if d * 10**e <= limit]


def operation(kind: str) -> str:
    """OpenTelemetry's gen_ai.operation.name."""
    return "chat" if kind == "chat" else "text_completion"


class _Live(Collector):
    """Gauges read from the supervisor at scrape time; what only the engine knows is up to a second old."""

    def __init__(self, model: str, supervisor: Supervisor) -> None:
        self._model, self._supervisor = model, supervisor

    def collect(self) -> Iterable[Metric]:
        s = self._supervisor
        running = min(s.active, s.slots)
        info = s.info
        values = {
            "vllm:num_requests_running": ("Answers that hold a slot.", running),
            "vllm:num_requests_waiting": ("Requests that wait for a slot.", s.active - running),
            "vllm:kv_cache_usage_perc": ("Share of the KV cache that running answers hold.", self._held()),
            "slmops_engine_ready": ("1 while the engine process is loaded and warmed.", int(s.ready)),
            "slmops_engine_slots": ("Answers that can run at the same time.", info.get("slots", 0)),
            "slmops_engine_threads": ("Threads of one model step.", info.get("threads", 0)),
            "slmops_model_load_seconds": ("Time to load and measure the model.", info.get("load_seconds", 0.0)),
            "slmops_model_warm_seconds": ("Time of the first answer.", info.get("warm_seconds", 0.0)),
            "slmops_model_max_len": ("Prompt + answer, in tokens.", info.get("max_len", 0)),
        }
        for name, (text, value) in values.items():
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        totals = {
            "slmops_engine_steps": ("Steps of the engine.", "count"),
            "slmops_engine_step_seconds": ("Their time.", "seconds"),
            "slmops_engine_step_tokens": ("Tokens that they made.", "tokens"),
            "vllm:spec_decode_num_drafts": ("Calls over guessed tokens.", "drafts"),
            "vllm:spec_decode_num_draft_tokens": ("Guessed tokens.", "draft_tokens"),
            "vllm:spec_decode_num_accepted_tokens": ("Of these, tokens that were right.", "accepted_tokens"),
        }
        for name, (text, key) in totals.items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model], s.steps.get(key, 0.0))
            yield counter
        yield self._step_sizes()
        if s.info:
            yield self._cache()
        if s.takes_adapters:
            yield self._adapters()

    def _step_sizes(self) -> HistogramMetricFamily:
        told = self._supervisor.steps
        totals = accumulate(told.get(f"size_{number}", 0) for number in range(len(STEP_SIZES) + 1))
        bounds = [*(repr(float(size)) for size in STEP_SIZES), "+Inf"]
        family = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens read and made in a step.", labels=["model_name"]
        )
        family.add_metric([self._model], list(zip(bounds, totals, strict=True)), told.get("sized", 0))
        return family

    def _cache(self) -> GaugeMetricFamily:
        """Any prefix is found again, whatever its length; but who reads vLLM's reckons in blocks."""
        info = self._supervisor.info
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache.",
            labels=["model_name", "block_size", "num_gpu_blocks", "kv_cache_size_tokens"],
        )
        blocks, tokens = info["slots"] * (info["max_len"] // BLOCK), info["slots"] * info["max_len"]
        family.add_metric([self._model, str(BLOCK), str(blocks), str(tokens)], 1)
        return family

    def _adapters(self) -> GaugeMetricFamily:
        """As vLLM tells it to routers: names in labels, and the newest series is the one that counts."""
        labels = ["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        running, waiting = (",".join(sorted(names)) for names in self._supervisor.adapters_at_work())
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters at work; the time of the scrape.", labels=labels
        )
        family.add_metric([self._model, str(self._supervisor.slots), running, waiting], time.time())
        return family

    def _held(self) -> float:
        s = self._supervisor
        room = s.slots * s.info.get("max_len", 0)
        return s.steps.get("held", 0.0) / room if s.active and room else 0.0


class _Gaps(Collector):
    """Inter-token latency under its two names: many values at once, for a fraction of a microsecond each."""

    NAMES = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")

    def __init__(self, model: str, buckets: Sequence[float]) -> None:
        self._model, self._bounds = model, [round(b * 1e6) for b in buckets]
        self._labels = [*(repr(float(b)) for b in buckets), "+Inf"]
        self._counts = [0] * len(self._labels)
        self._sum = 0  # microseconds

    def observe(self, gaps: Sequence[int]) -> None:
        """Microseconds from each token to the next."""
        for gap in gaps:
            self._counts[bisect_left(self._bounds, gap)] += 1
        self._sum += sum(gaps)

    def collect(self) -> Iterable[Metric]:
        for name in self.NAMES:
            family = HistogramMetricFamily(name, "From one token to the next.", labels=["model_name"])
            totals = accumulate(self._counts)
            family.add_metric([self._model], list(zip(self._labels, totals, strict=True)), self._sum / 1e6)
            yield family


class Metrics:
    """One registry, one series per name and pod; `names`: all of the model, the first is that of the series."""

    def __init__(self, names: Sequence[str], supervisor: Supervisor, max_len: int) -> None:
        model = names[0]
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series and nothing reads them
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_Live(model, supervisor))
        self._model, self._names, self._supervisor = model, frozenset(names), supervisor
        self._asked = set[str]()  # names that the series of _otel have

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=tuple(buckets), registry=self.registry)
            return made.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(model)

        success = Counter(
            "vllm:request_success",
            "Answers that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._success = {r: success.labels(model, r) for r in ("stop", "length", "abort", "error")}
        self._http = Counter(
            "slmops_http_requests",
            "Requests to /v1/*, by status code (499: the client left).",
            ["model_name", "code"],
            registry=self.registry,
        )
        for code in ("200", "500", "503"):  # a rate over them needs a zero to start from
            self._http.labels(model, code)
        self._rejected = Counter(
            "slmops_rejected_requests",
            "Requests that got no answer, by reason.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        for reason in ("queue_full", "queue_tokens", "deadline_exceeded", "deadline_unreachable", "not_ready"):
            self._rejected.labels(model, reason)
        self._cut = counter("slmops_streams_cut", "Streams that began with 200 and ended with an error of the server.")
        self._restarts = counter("slmops_engine_restarts", "Times the engine process was started again.")
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens read.")
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens taken from the cache.")
        self._cached = counter("vllm:prompt_tokens_cached", "Prompt tokens that were not computed again.")
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT)
        self._gaps = _Gaps(model, ITL_FINE)
        self.registry.register(self._gaps)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of one answer, after its first token.", ITL_FINE
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", E2E_FINE)
        self._queued = histogram("vllm:request_queue_time_seconds", "Arrival to slot.", E2E_FINE)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "Slot to first token.", E2E_FINE)
        self._decode = histogram("vllm:request_decode_time_seconds", "First to last token.", E2E_FINE)
        self._inference = histogram("vllm:request_inference_time_seconds", "Slot to last token.", E2E_FINE)
        self._n = histogram("vllm:request_params_n", "Answers asked for at once.", (1, 2, 5, 10, 20))
        self._limit = histogram("vllm:request_params_max_tokens", "Longest answer asked for.", _steps(max_len))
        self._size_in = histogram("vllm:request_prompt_tokens", "Prompt length.", _steps(max_len))
        self._size_out = histogram("vllm:request_generation_tokens", "Answer length.", _steps(max_len))
        self._longest = histogram(
            "vllm:request_max_num_generation_tokens", "Longest answer to a request.", _steps(max_len)
        )
        counter("vllm:num_preemptions", "Answers that lost their slot to others: none ever does.")
        labels = ["model_name", "gen_ai_operation_name", "gen_ai_request_model", "gen_ai_provider_name"]

        def otel(name: str, text: str, buckets: Iterable[float], *more: str) -> Histogram:
            return Histogram(name, text, [*labels, *more], buckets=tuple(buckets), registry=self.registry)

        self._otel = (
            otel(
                "gen_ai_server_request_duration_seconds",
                "Arrival to the last token of a request's answers, or to the error that it ended with.",
                OTEL_DURATION,
                "error_type",
            ),
            otel("gen_ai_server_time_to_first_token_seconds", "Arrival to first token.", OTEL_TTFT),
            otel(
                "gen_ai_server_time_per_output_token_seconds", "Mean of one answer, after its first token.", OTEL_TPOT
            ),
        )

    def http(self, code: int) -> None:
        """A response to /v1/* began (or its client left before: 499)."""
        self._http.labels(self._model, str(code)).inc()

    def rejected(self, reason: str) -> None:
        """A request, or its connection, was refused or cut off, for no flaw of what it asked for."""
        self._rejected.labels(self._model, reason).inc()

    def refused(self, error: ApiError) -> None:
        """A connection was refused before there was a request, or cut off without an answer (499)."""
        self.rejected(error.reason or "invalid_http")
        if error.status != CLIENT_LEFT:
            self.http(error.status)

    def asked(self, n: int, limit: int) -> None:
        """A request was answered that asked for n answers of at most `limit` tokens."""
        self._n.observe(n)
        self._limit.observe(limit)

    def answered(self, kind: str, name: str, arrival: float, lasts: Sequence[Delta]) -> None:
        """A request by that name came to its end, with these answers."""
        self._longest.observe(max(last.tokens for last in lasts))
        self._otel[0].labels(*self._labels(kind, name), "").observe(max(last.last for last in lasts) - arrival)

    def failed(self, kind: str, name: str, arrival: float, error: str) -> None:
        """A request by that name, "" where it had none, ended with an error of that type."""
        self._otel[0].labels(*self._labels(kind, name), error).observe(now() - arrival)

    def _labels(self, kind: str, name: str) -> tuple[str, ...]:
        # no other names: clients would choose how many series there are
        known = name in self._names or name in self._supervisor.adapters
        self._asked.add(name := name if known else "")
        return self._model, operation(kind), name, PROVIDER

    def restarted(self) -> None:
        """The engine process was started again."""
        self._restarts.inc()

    def ended(self, reason: str) -> None:
        """An answer ended without its last token: "abort" (the client left) or "error"."""
        self._success[reason].inc()

    def cut(self) -> None:
        """A stream that had begun ended with an error that is the server's: its status cannot say so any more."""
        self._cut.inc()

    def finished(self, kind: str, name: str, last: Delta, arrival: float, prompt: int) -> None:
        """A whole answer by that name, by its last delta. Times are of CLOCK_MONOTONIC in seconds."""
        self._success[last.finish or "error"].inc()
        self._prompt.inc(prompt)
        self._queries.inc(prompt)
        self._hits.inc(last.cached)
        self._cached.inc(last.cached)
        self._generated.inc(last.tokens)
        self._size_in.observe(prompt)
        self._size_out.observe(last.tokens)
        self._ttft.observe(last.first - arrival)
        self._e2e.observe(last.last - arrival)
        self._queued.observe(last.started - arrival)
        self._prefill.observe(last.first - last.started)
        self._decode.observe(last.last - last.first)
        self._inference.observe(last.last - last.started)
        self._gaps.observe(last.gaps)
        ttft, tpot = (h.labels(*self._labels(kind, name)) for h in self._otel[1:])
        ttft.observe(last.first - arrival)
        if last.tokens > 1:
            mean = (last.last - last.first) / (last.tokens - 1)
            self._tpot.observe(mean)
            tpot.observe(mean)

    def render(self) -> bytes:
        """Prometheus text format. Series of adapters that are gone go too, or they would grow in number for ever."""
        for name in self._asked - self._names - self._supervisor.adapters.keys() - {""}:
            for histogram in self._otel:
                histogram.remove_by_labels({"gen_ai_request_model": name})
            self._asked.discard(name)
        return generate_latest(self.registry)


def now() -> float:
    """The clock of all times above."""
    return time.monotonic()
