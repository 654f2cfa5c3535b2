"""From measured values to verdicts, and from verdicts to what they mean together."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from slmops.api.deployment import AnalysisMetric, Verdict

PASS: Literal["Pass", "Fail"] = "Pass"  # noqa: S105  # a verdict
FAIL: Literal["Pass", "Fail"] = "Fail"


def judge(metric: AnalysisMetric, value: float) -> Verdict:
    """Pass within the bounds, Fail outside; NoData for what is no number."""
    if not math.isfinite(value):
        return Verdict(name=metric.name, verdict="NoData", message="The query gave no number (NaN or infinite).")
    verdict, message = PASS, ""
    if metric.max is not None and value > metric.max:
        verdict, message = FAIL, f"{value:.4g} is above {metric.max:g}"
    elif metric.min is not None and value < metric.min:
        verdict, message = FAIL, f"{value:.4g} is below {metric.min:g}"
    return Verdict(name=metric.name, verdict=verdict, value=value, message=message, query=_short(metric))


def _short(metric: AnalysisMetric) -> str:
    """Name what a metric asks for."""
    return hashlib.sha256(f"{metric.builtin} {metric.query}".encode()).hexdigest()[:8]


def too_few(metrics: Iterable[AnalysisMetric], samples: int, least: int) -> tuple[Verdict, ...]:
    """The verdicts before there is enough evidence: nothing is asked, nothing is judged."""
    message = f"{samples} of {least} requests answered in this step"
    return tuple(Verdict(name=m.name, verdict="TooFewSamples", message=message) for m in metrics)


def first_failed(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The first Fail."""
    return next((v for v in verdicts if v.verdict == FAIL), None)


def first_unknown(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The first that is neither Pass nor Fail."""
    return next((v for v in verdicts if v.verdict not in (PASS, FAIL)), None)


def any_answer(verdicts: Iterable[Verdict]) -> bool:
    """Whether any metric was measured. One that never is would else stretch the windows of the others without end."""
    return any(v.verdict in (PASS, FAIL) for v in verdicts)


def all_pass(verdicts: Sequence[Verdict]) -> bool:
    """Whether there is evidence, and all of it is good."""
    return bool(verdicts) and all(v.verdict == PASS for v in verdicts)


def still_pass(metrics: Iterable[AnalysisMetric], last: Iterable[Verdict]) -> bool:
    """Whether what was measured last passes all metrics as they are now: users edit them while a step runs."""
    known = {verdict.name: verdict for verdict in last}
    for metric in metrics:
        found = known.get(metric.name)
        if found is None or found.verdict != PASS:
            return False
        if found.query not in ("", _short(metric)):  # "": of an older operator
            return False
        if found.value is not None and judge(metric, found.value).verdict != PASS:
            return False
    return True
