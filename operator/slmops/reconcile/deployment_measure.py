"""One measurement of a rollout: every metric asked of Prometheus and judged."""

from collections.abc import Callable
from datetime import datetime

from slmops.api.deployment import AnalysisMetric, ModelDeploymentSpec, ModelDeploymentStatus, Verdict
from slmops.cluster.port import Object
from slmops.remote.prometheus import Answer, Inconclusive, NoData, Unreachable, Value
from slmops.rollout.queries import Context, promql
from slmops.rollout.verdicts import judge

NO_PROMETHEUS = (
    "The operator knows no Prometheus: set prometheus.url, or prometheus.bundled.enabled, in the chart. "
    "The rollout holds until then."
)


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
    context = Context(
        namespace=obj["metadata"]["namespace"],
        name=obj["metadata"]["name"],
        revision=candidate.revision,
        stable=status.stable.revision if status.stable else "",
        window=window,
    )
    answer: Answer = Unreachable(NO_PROMETHEUS)
    verdicts: list[Verdict] = []
    for number, metric in enumerate(analysis.metrics):
        if url and (number == 0 or not isinstance(answer, Unreachable)):
            answer = query(url, promql(metric, context), now)
        verdicts.append(_verdict(metric, answer))
    return tuple(verdicts)


def _verdict(metric: AnalysisMetric, answer: Answer) -> Verdict:
    match answer:
        case Value():
            return judge(metric, answer.value)
        case NoData():
            return Verdict(name=metric.name, verdict="NoData", message=answer.message[:512])
        case Inconclusive():
            return Verdict(name=metric.name, verdict="Inconclusive", message=answer.message[:512])
    return Verdict(name=metric.name, verdict="Unreachable", message=answer.message[:512])
