"""One measurement of a rollout: every metric asked of Prometheus and judged."""

from collections.abc import Callable
from datetime import datetime

from slmops.api.deployment import AnalysisMetric, ModelDeploymentSpec, ModelDeploymentStatus, Verdict
from slmops.api.times import parse
from slmops.cluster.port import Object
from slmops.remote.prometheus import Answer, Inconclusive, NoData, Unreachable, Value
from slmops.rollout.queries import Context, promql
from slmops.rollout.verdicts import judge

NO_PROMETHEUS = (
    "The operator knows no Prometheus: set prometheus.url, or prometheus.bundled.enabled, in the chart. "
    "The rollout holds until then."
)

# Of so many requests that minSamples asks for, Prometheus has to know of one. Not of all: what a router answered before
# its first scrape, or since the last one, is in no increase.
KNOWN = 2
# Seconds. Of a longer step a Prometheus may have forgotten the begin: the bundled one keeps as much. What it may know
# at the pace of the step is asked for, or a candidate with few requests would wait for ever.
KEPT = 6 * 3600


def measure(
    obj: Object,
    spec: ModelDeploymentSpec,
    status: ModelDeploymentStatus,
    url: str,
    now: datetime,
    window: int,
    query: Callable[[str, str, datetime], Answer],
) -> tuple[Verdict, ...]:
    """A verdict for each metric, over the last `window` seconds. Once Prometheus is silent, the rest is not asked."""
    analysis, candidate = spec.rollout.analysis, status.candidate
    assert analysis is not None
    assert candidate is not None
    began = status.rollout.routed_at or status.rollout.entered_at
    age = int((now - parse(began)).total_seconds()) if began else 0
    least = analysis.min_samples // KNOWN
    if age > KEPT and least:
        least = max(1, least * KEPT // age)
    context = Context(
        namespace=obj["metadata"]["namespace"],
        name=obj["metadata"]["name"],
        revision=candidate.revision,
        stable=status.stable.revision if status.stable else "",
        window=window,
        step=min(max(age, window), KEPT),
        least=least,
    )
    answer: Answer = Unreachable(NO_PROMETHEUS)
    verdicts: list[Verdict] = []
    for number, metric in enumerate(analysis.metrics):
        if url and (number == 0 or not isinstance(answer, Unreachable)):
            answer = query(url, promql(metric, context), now)
        verdicts.append(_verdict(metric, answer, context.least if metric.builtin else 0))
    return tuple(verdicts)


def _verdict(metric: AnalysisMetric, answer: Answer, least: int) -> Verdict:
    match answer:
        case Value():
            return judge(metric, answer.value)
        case NoData():
            wanted = f" It has to have seen {least} answers of this step." if least else ""
            return Verdict(name=metric.name, verdict="NoData", message=answer.message[:400] + wanted)
        case Inconclusive():
            return Verdict(name=metric.name, verdict="Inconclusive", message=answer.message[:512])
    return Verdict(name=metric.name, verdict="Unreachable", message=answer.message[:512])
