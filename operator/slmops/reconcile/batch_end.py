"""How a batch object ends: its result, its failure, trying again, and the removal of its Job. Pure."""

import math
from datetime import timedelta
from typing import Any

from slmops.api.meta import BatchStatus, Failure, Lineage, Progress
from slmops.api.run import EXIT_FATAL, RunResult
from slmops.api.times import parse, stamp
from slmops.build.inputs import inputs, may_change
from slmops.cluster.port import Object
from slmops.reconcile import conditions
from slmops.reconcile.batch_pass import Pass, complete, failed, going_on, plan
from slmops.reconcile.conditions import cut
from slmops.reconcile.needs import RECHECK_SECONDS
from slmops.reconcile.pods import (
    HELD_AFTER,
    INTERRUPTED,
    created,
    ended_well,
    failure_of,
    result_of,
    terminated,
)
from slmops.reconcile.state import Event, Plan

# Reasons for which the world is to blame: it may mend itself, or be mended, without a change of the object. And what
# nobody can know, for it may be one of these.
WORLD = frozenset(
    {
        *("SourceUnavailable", "SourceNotFound", "StoreUnavailable", "TeacherUnavailable", "AccessDenied", "DiskFull"),
        *("Evicted", "NodeRefused", "NodeFailed", "ResultLost"),
    }
)
QUICK = (timedelta(seconds=30), timedelta(hours=1))  # the first delay of a retry, and the longest
# What somebody has to mend: it does not pass by itself, nothing tells when it is mended, and each look costs a pod.
SLOW = (timedelta(minutes=10), timedelta(hours=6))
# A Job fails within seconds of its last pod, and the one before that is longer ago: the Job's controller waits between,
# ten seconds at first.
AT_ONCE = timedelta(seconds=9)
GOT_ON = timedelta(minutes=30)  # a try that lasted so long found what the ones before it missed
RECHECK_FAILED = 60.0  # seconds between two looks at a failed object's ConfigMaps
LINEAGE_MAX = 64
TABLE = {"quality": 64, "size": 32, "delta": 32}  # status fields for the table, and their lengths in the CRD


def conclude(p: Pass, job: Object) -> Plan | None:
    """End the object if its run is over; None while it is not."""
    for pod in reversed(p.seen.pods):
        result = result_of(pod)
        if result is not None and result.succeeded and result.artifact is not None and failure_of(pod) is None:
            return _succeeded(p, job, pod, result)
    if _is(job, "Complete"):
        return _without_result(p, job)
    if _is(job, "Failed"):
        return _failed(p, _cause(p, job))
    return None


def is_finished(job: Object) -> bool:
    """Whether the Job's controller makes no other pod of it."""
    return _is(job, "Complete") or _is(job, "Failed")


def collected(p: Pass) -> Plan:
    """Keep a finished object as it is; remove its Job when its time has come."""
    status = p.status.model_copy(
        update={
            "inputs": known_inputs(p),
            "observed_generation": p.generation,
            "conditions": [c.model_copy(update={"observed_generation": p.generation}) for c in p.status.conditions],
        }
    )
    maps = _maps(p.seen.inputs or p.status.inputs or "")  # as they are, or were: one that is missing comes back
    again = RECHECK_FAILED if maps and p.status.artifact is None else None
    job, end = p.seen.job, p.status.completion_time
    kept = None if job is None else _kept(p, job)
    if job is None or kept is None or end is None or job["metadata"].get("deletionTimestamp"):
        return plan(status, requeue=again)
    left = p.until(stamp(parse(end) + timedelta(seconds=kept)))
    if left > 0:
        return plan(status, requeue=min(left, again or left))
    return plan(status, requeue=again, delete=(p.job_key,))


def worth_again(p: Pass) -> bool:
    """Whether something was changed that could make a failed object succeed.

    Not a Secret: what a Secret opens fails for one of WORLD's reasons. Tokens are renewed every hour, and each time a
    run that diverged would be paid for once more.
    """
    known = p.status.inputs or ""
    if p.seen.inputs and known and not older(known) and _maps(p.seen.inputs) != _maps(known):
        return True
    said, failure = conditions.find(p.status.conditions, conditions.FAILED), p.status.last_failure
    if said is None or failure is None or (said.observed_generation or 0) >= p.generation:
        return False
    if failure.reason == "DeadlineExceeded":
        limit = p.spec.active_deadline_seconds
        return limit is None or limit > _deadline(p)
    return failure.exit_code != EXIT_FATAL and p.spec.backoff_limit >= p.status.attempts


def known_inputs(p: Pass) -> str | None:
    """The hash of the inputs to compare later ones with; one of a former operator is replaced where it can be."""
    known = p.status.inputs
    return p.seen.inputs or known if known and older(known) else known


def changed(p: Pass) -> bool:
    """Whether something was changed that ends the wait for a retry; a Secret mends for WORLD's reasons alone."""
    known, now, failure = p.status.inputs, p.seen.inputs, p.status.last_failure
    if not now or known is None or older(known):
        return False
    whole = failure is None or failure.reason in WORLD
    return now != known if whole else _maps(now) != _maps(known)


def retry_requeue(p: Pass, at: str) -> float:
    """When to look again while waiting for a retry: at its time, or sooner if something that is named may change."""
    if not p.status.inputs:
        return p.until(at)
    return min(p.until(at), conditions.patiently(RECHECK_SECONDS, p.status.conditions, p.now))


def retries(p: Pass, failure: Failure | None) -> int:
    """The retries so far, where this failure is the last one: those of delays other than before are counted anew."""
    before = p.status.last_failure
    delays = _delays(p, failure.reason) if failure else None
    return p.status.retries if before is None or delays in (None, _delays(p, before.reason)) else 0


def to_mend(p: Pass, failure: Failure) -> bool:
    """Whether the retries of an object that failed so wait for somebody to mend something."""
    return _delays(p, failure.reason) == SLOW


def waiting(p: Pass, failure: Failure, at: str, **fields: Any) -> BatchStatus:
    """Put together the status of an object whose next try starts at `at`.

    Where somebody has to mend something first it is Stalled and its phase is Failed, so that those who watch it call
    for somebody. It is not over: the condition Failed is of what is not looked at again.
    """
    message = f"{failure.message} The next try starts at {at}."
    if not to_mend(p, failure):
        return going_on(p, "Waiting", failure.reason, message, **fields)
    status = going_on(p, "Failed", failure.reason, message, **fields)
    kept = [c for c in p.status.conditions if c.type == conditions.STALLED]  # for the time at which it changed
    said = conditions.stalled([*status.conditions, *kept], failure.reason, message, generation=p.generation, now=p.now)
    return status.model_copy(update={"conditions": said})


def _succeeded(p: Pass, job: Object, pod: Object, result: RunResult) -> Plan:
    assert result.artifact is not None
    artifact = result.artifact
    table = {name: cut(getattr(result, name), limit) or None for name, limit in TABLE.items()}
    known = {name: value for name, value in table.items() if name in type(p.status).model_fields}
    message = cut(f"Wrote {artifact.uri}" + (f"; {table['quality']}" if table["quality"] else ""))
    status = complete(
        p,
        message,
        artifact=artifact,
        lineage=Lineage(digest=artifact.digest, parents=result.lineage[:LINEAGE_MAX]),
        metrics=_numbers(result) or None,
        completion_time=_finished_at(pod) or p.stamp(),
        progress=Progress(percent=100, stage="Done", time=p.stamp()),
        **known,
    )
    return plan(status, Event("Succeeded", message), requeue=_kept(p, job))


def _kept(p: Pass, job: Object) -> float | None:
    """Seconds after the run's end for which its Job is kept; None for ever.

    A Job that does not end after its run has a pod that does not: its GPU is not kept for a sidecar.
    """
    ttl = p.spec.ttl_seconds_after_finished
    if is_finished(job):
        return ttl
    held = HELD_AFTER.total_seconds()
    return held if ttl is None else min(ttl, held)


def _without_result(p: Pass, job: Object) -> Plan:
    """The Job says complete, but nobody left a result."""
    well = [pod for pod in p.seen.pods if ended_well(pod)]
    if not well:  # what it wrote is still there, and a new pod finds it
        time = _condition(job, "Complete").get("lastTransitionTime") or p.stamp()
        message = "The pod that ended well went before its result was read; another one looks for what it wrote."
        return _failed(p, Failure(reason="ResultLost", message=message, time=time))
    name = well[-1]["metadata"]["name"]
    message = f"Pod {name} ended well but left no result. Is spec.pod.image a trainer of this version?"
    return _failed(p, Failure(reason="InternalError", message=message, exit_code=EXIT_FATAL, time=p.stamp()))


def _failed(p: Pass, failure: Failure) -> Plan:
    event = Event(failure.reason, failure.message, warning=True)
    measured = _last_result(p)
    found: dict[str, Any] = {"metrics": _numbers(measured) or p.status.metrics} if measured else {}
    delays = _delays(p, failure.reason)
    if delays is not None:
        anew = delays == QUICK and _lasted(p) >= GOT_ON  # a long try that ends in the same fault is a dear one
        found["retries"] = 0 if anew else retries(p, failure)
        first, most = delays
        at = stamp(p.now + min(first * (1 << min(found["retries"], 16)), most))
        status = waiting(p, failure, at, next_retry_time=at, last_failure=failure, **found)
        return plan(status, event, requeue=retry_requeue(p, at))
    status = failed(p, failure, completion_time=failure.time, **found)
    ttl = p.spec.ttl_seconds_after_finished
    return plan(status, event, requeue=RECHECK_FAILED if ttl is None else min(ttl, RECHECK_FAILED))


def _delays(p: Pass, reason: str) -> tuple[timedelta, timedelta] | None:
    """The first and the longest delay of the retries; None where the object has failed for good."""
    if reason in WORLD:
        return QUICK
    if reason == "TeacherAnswersRejected":
        return SLOW
    read = inputs(p.spec)
    sets = {dataset.uri for dataset in read.datasets if dataset.uri}
    uris = {"UnsupportedModel": read.models, "BadDataset": sets}.get(reason, ())
    return SLOW if any(map(may_change, uris)) else None


def _cause(p: Pass, job: Object) -> Failure:
    """Why the Job failed: what its last failed pod said, unless the Job itself knows better.

    That pod may be gone, with its node, while those before it are there. What nobody can know then is no end.
    """
    said = _condition(job, "Failed")
    reason, time = str(said.get("reason") or "Failed"), said.get("lastTransitionTime") or p.stamp()
    if reason == "DeadlineExceeded":
        limit = (job.get("spec") or {}).get("activeDeadlineSeconds")
        message = (
            f"The run took longer than spec.activeDeadlineSeconds ({limit} s). "
            "Raise it, or remove it: the run goes on from its checkpoint."
        )
        return Failure(reason=reason, message=message, time=time)
    found = [one for pod in p.seen.pods if (one := failure_of(pod)) is not None and one.reason != INTERRUPTED]
    counted = sum(one.reason != "Evicted" for one in found)
    before = p.status.last_failure
    noted = [before] if before is not None and parse(before.time) >= created(job) else []
    if reason == "PodFailurePolicy":
        known = [one for one in (*noted, *found) if one.exit_code == EXIT_FATAL]
    elif found and counted >= int((job.get("status") or {}).get("failed") or 0):
        known = found
    else:
        known = [one for one in (*noted, *found) if parse(time) - parse(one.time) <= AT_ONCE]
    if known:
        return known[-1]
    words = f"The last pod went before its reason was read; another one goes on from its checkpoint. {reason}: "
    return Failure(reason="ResultLost", message=cut(words + str(said.get("message") or "the Job failed.")), time=time)


def _maps(inputs: str) -> str:
    """The hash of the ConfigMaps alone, of those that needs.check() gives."""
    return inputs.partition(".")[0]


def older(inputs: str) -> bool:
    """Whether a former operator wrote this hash, of ConfigMaps and Secrets together: it compares with none of ours."""
    return "." not in inputs


def _deadline(p: Pass) -> float:
    """Which deadline the Job missed; where the Job is gone, how long the run was."""
    before = ((p.seen.job or {}).get("spec") or {}).get("activeDeadlineSeconds")
    if before is not None:
        return float(before)
    if p.status.start_time is None or p.status.completion_time is None:
        return 0.0
    return (parse(p.status.completion_time) - parse(p.status.start_time)).total_seconds()


def _last_result(p: Pass) -> RunResult | None:
    return next((found for pod in reversed(p.seen.pods) if (found := result_of(pod)) is not None), None)


def _numbers(result: RunResult | None) -> dict[str, float]:
    """Measured values; what is not finite cannot be written as JSON."""
    return {name: value for name, value in result.metrics.items() if math.isfinite(value)} if result else {}


def _lasted(p: Pass) -> timedelta:
    """How long the last pod's container ran."""
    state = terminated(p.seen.pods[-1]) if p.seen.pods else None
    began, end = (state or {}).get("startedAt"), (state or {}).get("finishedAt")
    return parse(end) - parse(began) if began and end else timedelta(0)


def _finished_at(pod: Object) -> str | None:
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        found = ((container.get("state") or {}).get("terminated") or {}).get("finishedAt")
        if found:
            return str(found)
    return None


def _condition(job: Object, kind: str) -> Object:
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition.get("type") == kind and condition.get("status") == "True":
            found: Object = condition
            return found
    return {}


def _is(job: Object, kind: str) -> bool:
    return bool(_condition(job, kind))
