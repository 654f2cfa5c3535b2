"""PromQL of a metric. What it assumes of the scrape configuration stands in docs/metrics.md."""

from dataclasses import dataclass

from slmops.api.deployment import AnalysisMetric
from slmops.api.keys import label_value


@dataclass(frozen=True)
class Context:
    """What fills the placeholders."""

    namespace: str
    name: str
    revision: str
    stable: str
    window: int  # seconds
    step: int  # seconds since the step began, as far as Prometheus has to know of them
    least: int  # requests of these seconds of which Prometheus has to know; 0: it is not asked


# Seen by the router: every answer of a revision's pods, also one that a client never saw because another revision
# answered in its place. An answer that broke off in the middle counts as an error; so does a stream that ends with an
# error frame, by its server's own count: HAProxy saw 200 and a proper end (servers of another image may not count it).
# A 504 says that the time was over which the client itself had given, a 503 may say that it is too short: such tell
# nothing of the candidate, so they are no answers here, and the router has them in a class of its own, with the
# requests whose clients left before an answer began. The servers count such, too, but are scraped at other moments: to
# subtract their count from the router's left errors where there were none.
_ERROR_RATE = (
    '(sum(rate(haproxy_backend_http_responses_total{%(router)s,code="5xx"}[%(window)ds]))'
    " + sum(rate(haproxy_backend_server_aborts_total{%(router)s}[%(window)ds]))"
    " + (sum(rate(slmops_streams_cut_total{%(server)s}[%(window)ds])) or vector(0)))"
    ' / sum(rate(haproxy_backend_http_responses_total{%(router)s,code=~"2xx|3xx|4xx|5xx"}[%(window)ds]))'
)
_LATENCY_P95 = (
    "histogram_quantile(0.95, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket{%(server)s}[%(window)ds])))"
)
_BUILTINS = {
    "errorRate": (_ERROR_RATE, 'haproxy_backend_http_responses_total{%(router)s,code=~"2xx|3xx|4xx|5xx"}'),
    "latencyP95": (_LATENCY_P95, "vllm:e2e_request_latency_seconds_count{%(server)s}"),
}
# A Prometheus that lost its data in the middle of a step would judge it by the seconds since. Asked of the whole step,
# in which the routers have counted minSamples: by those of a window, what has requests by day might wait all night.
_KNOWN = "(%(query)s) and (sum(increase(%(answers)s[%(step)ds])) >= %(least)d)"


def promql(metric: AnalysisMetric, context: Context) -> str:
    """Write the query of a metric: a builtin, or the user's with its placeholders filled in."""
    if metric.builtin is None:
        return _fill(metric.query or "", context)
    owner = f'namespace="{context.namespace}",slmops_owner="{label_value(context.name)}"'
    places = {
        "router": f'{owner},proxy="{context.revision}"',
        "server": f'{owner},slmops_revision="{context.revision}"',
        "window": context.window,
    }
    query, answers = (text % places for text in _BUILTINS[metric.builtin])
    if context.least == 0:
        return query
    return _KNOWN % {"query": query, "answers": answers, "step": context.step, "least": context.least}


def _fill(query: str, context: Context) -> str:
    values = {
        "namespace": context.namespace,
        "name": context.name,
        "revision": context.revision,
        "stable": context.stable,
        "window": f"{context.window}s",
    }
    for name, value in values.items():
        query = query.replace("{{" + name + "}}", value)
    return query
