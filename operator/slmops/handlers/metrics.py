"""The operator's own metrics."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from slmops import __version__
from slmops.cluster.port import Key
from slmops.handlers.known import Known
from slmops.handlers.work import Work
from slmops.reconcile.deployment import OUTCOMES
from slmops.reconcile.state import Count

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_RUN_SECONDS = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400, 259200)


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        Gauge("slmops_build_info", "The operator's version.", ["version"], registry=self.registry).labels(
            __version__
        ).set(1)
        self._passes = Histogram(
            "slmops_reconcile_seconds", "Duration of passes.", ["kind"], buckets=_SECONDS, registry=self.registry
        )
        self._errors = Counter(
            "slmops_reconcile_errors", "Passes that could not be finished.", ["kind"], registry=self.registry
        )
        self._calls = Counter(
            "slmops_api_requests",
            "Calls of the Kubernetes API by verb, kind and status code; code 0 is no answer.",
            ["verb", "kind", "code"],
            registry=self.registry,
        )
        self._call_seconds = Histogram(
            "slmops_api_request_seconds", "Duration of these calls.", ["verb"], buckets=_SECONDS, registry=self.registry
        )
        self._runs = Histogram(
            "slmops_run_seconds",
            "Duration of runs that ended, from the first pod's creation.",
            ["kind", "outcome"],
            buckets=_RUN_SECONDS,
            registry=self.registry,
        )
        whose = ["namespace", "name"]
        self._counters = {
            "rollouts": Counter(
                "slmops_rollouts",
                "Rollouts that started, and how they ended.",
                [*whose, "outcome"],
                registry=self.registry,
            ),
            "verdicts": Counter(
                "slmops_rollout_verdicts",
                "Measurements of rollouts by metric and verdict.",
                [*whose, "metric", "verdict"],
                registry=self.registry,
            ),
        }
        self._verdicts: dict[tuple[str, ...], set[tuple[str, ...]]] = {}  # labels of its series, by object
        self.watch_restarts = Counter(
            "slmops_watch_restarts", "How often the watches had to be started again.", registry=self.registry
        )

    def observe(self, work: Work, known: Known) -> None:
        """Read the queue's and the objects' figures from here on, whenever somebody scrapes."""
        Gauge("slmops_queue_depth", "Objects that wait for a worker.", registry=self.registry).set_function(work.depth)
        Gauge(
            "slmops_queue_oldest_seconds", "How long the first of them has waited.", registry=self.registry
        ).set_function(work.oldest)
        self.registry.register(_Objects(known))

    def on_pass(self, key: Key, seconds: float, failed: bool) -> None:
        """See work.OnPass."""
        self._passes.labels(key.kind).observe(seconds)
        if failed:
            self._errors.labels(key.kind).inc()
        if key.kind == "ModelDeployment":
            for outcome in OUTCOMES.values():  # increase() does not see a series begin at 1: at 0 from the first pass
                self._counters["rollouts"].labels(key.namespace, key.name, outcome)

    def on_end(self, kind: str, outcome: str, seconds: float) -> None:
        """See driver.OnEnd."""
        self._runs.labels(kind, outcome).observe(seconds)

    def on_counts(self, counts: tuple[Count, ...]) -> None:
        """See driver.OnCounts. Series of metrics that the analysis has no more go: names are anybody's choice."""
        for count in counts:
            self._counters[count.counter].labels(*count.labels).inc()
        measured = [count.labels for count in counts if count.counter == "verdicts"]
        if not measured:
            return
        names = {metric for _, _, metric, _ in measured}  # a measurement is of all that the analysis has
        told = self._verdicts.get(measured[0][:2], set()).union(measured)
        kept = {labels for labels in told if labels[2] in names}
        for labels in told - kept:
            self._counters["verdicts"].remove(*labels)
        self._verdicts[measured[0][:2]] = kept

    def on_gone(self, key: Key) -> None:
        """See work.OnGone: the series of a deployment go with it, or they would pile up where many come and go."""
        if key.kind == "ModelDeployment":
            for counter in self._counters.values():
                counter.remove_by_labels({"namespace": key.namespace, "name": key.name})
            self._verdicts.pop((key.namespace, key.name), None)

    def on_call(self, verb: str, kind: str, status: int, seconds: float) -> None:
        """See cluster.kube.OnCall."""
        self._calls.labels(verb, kind, str(status)).inc()
        self._call_seconds.labels(verb).observe(seconds)


class _Objects(Collector):
    def __init__(self, known: Known) -> None:
        self._known = known

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily("slmops_objects", "Objects by kind and phase.", labels=["kind", "phase"])
        for (kind, phase), number in sorted(self._known.phases().items()):
            family.add_metric([kind, phase], number)
        yield family
        yield GaugeMetricFamily(
            "slmops_deployments_unavailable",
            "ModelDeployments with a stable revision, but no ready pod of it, or no router.",
            value=self._known.unanswered(),
        )
