"""The life of a batch object, from waiting for its sources to its end: `decide`. Pure; see batch.py for the rules."""

import re
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from slmops.api.meta import Failure, Status
from slmops.api.times import parse, stamp
from slmops.build.job import held, queue_of, revised
from slmops.cluster.port import Object
from slmops.reconcile import conditions
from slmops.reconcile.batch_end import (
    changed,
    collected,
    conclude,
    known_inputs,
    retries,
    retry_requeue,
    to_mend,
    waiting,
    worth_again,
)
from slmops.reconcile.batch_pass import ANNOTATION_IMAGE, ANNOTATION_INPUTS, Pass, going_on, plan, progress
from slmops.reconcile.conditions import cut
from slmops.reconcile.pods import (
    INTERRUPTED,
    NO_IMAGE,
    Trouble,
    created,
    ended,
    failure_of,
    held_up,
    lost,
    over_quota,
    running,
    told,
    trouble_of,
)
from slmops.reconcile.state import Event, Plan

POLL_RUNNING, POLL_RUNNING_MAX = 3.0, 30.0  # seconds between two looks at the progress of a run; it may take days
POLL_STARTING = 15.0  # at a pod that does not start: some causes are told by Events alone
_POD_FORBIDDEN = re.compile(r'^pods "[^"]*" is forbidden: ')
POLL_PODLESS = 5.0  # and at the Job's events while it has no pod: nothing else tells why
_HELD = (
    "Its Job is suspended, not by spec.suspend: it goes on when whoever did that resumes it. Kueue may hold Jobs "
    "without a queue; an object with spec.queueName has one."
)
_TRIED_AGAIN = "It is tried again; the Job of the last try is removed first."


def decide(p: Pass) -> Plan:
    """Decide on one object."""
    if conditions.is_true(p.status.conditions, conditions.COMPLETE):
        return collected(p)
    if conditions.is_true(p.status.conditions, conditions.FAILED):
        return _again(p, start_time=None, completion_time=None) if worth_again(p) else collected(p)
    if p.seen.job is None or _stale(p, p.seen.job):
        return _between_jobs(p)
    return _with_job(p, p.seen.job)


def _again(p: Pass, **fields: Any) -> Plan:
    """Decide on another try and do no more: the pass after this one acts on what the status says by then.

    Nothing else tells of that decision once the old Job is gone, nor which Job is the new one. A pass that acts first
    and is killed before its status leaves a Job behind that the next pass removes, as its own decision's old one.
    """
    due = _soonest(p)
    status = going_on(p, "Waiting", "Retrying", _TRIED_AGAIN, next_retry_time=stamp(due), **fields)
    return plan(status, requeue=(due - p.now).total_seconds())


def _soonest(p: Pass) -> datetime:
    """When a retry may begin: the old Job has to be older than its time, which is told in whole seconds."""
    return p.now if p.seen.job is None else max(p.now, created(p.seen.job) + timedelta(seconds=1))


def _stale(p: Pass, job: Object) -> bool:
    """Whether the Job is the one that a retry shall replace: a Job made for the retry is younger than its time."""
    return p.status.next_retry_time is not None and created(job) < parse(p.status.next_retry_time)


def _between_jobs(p: Pass) -> Plan:
    seen, old = p.seen, p.seen.job
    if p.spec.suspend:
        return _suspended(p, delete=old is not None)
    retry_at, failure = p.status.next_retry_time, p.status.last_failure
    if retry_at and failure and p.until(retry_at):
        if changed(p):
            return _again(p, retries=0 if to_mend(p, failure) else p.status.retries)
        return plan(waiting(p, failure, retry_at, inputs=known_inputs(p)), requeue=retry_requeue(p, retry_at))
    if old is not None:
        status = going_on(p, "Waiting", "Retrying", _TRIED_AGAIN)
        gone = () if old["metadata"].get("deletionTimestamp") else (p.job_key,)
        return plan(status, delete=gone, requeue=POLL_PODLESS)
    if seen.former:
        name = seen.former[0]["metadata"]["name"]
        message = f"Pod {name} of the last try still saves its checkpoint."
        stuck = lost(seen.former[0], p.now) or Trouble("PodTerminating", message)
        status = going_on(p, "Waiting", stuck.reason, stuck.message)
        return plan(status, *_first(p, stuck), requeue=POLL_PODLESS)
    if seen.wanted is None:
        blocked = seen.blocked
        if blocked is None:  # cannot be: observing looks for what is wanted whenever there is no Job
            raise AssertionError("neither a Job wanted nor a reason against it")
        after = None if blocked.after is None else conditions.patiently(blocked.after, p.status.conditions, p.now)
        return plan(going_on(p, "Waiting", blocked.reason, blocked.message), requeue=after)
    status = going_on(
        p,
        "Pending",
        "Starting",
        "The pod starts.",
        inputs=seen.inputs or None,
        next_retry_time=None,
        retries=p.status.retries + (retry_at is not None),
    )
    return plan(status, apply=(seen.wanted,), requeue=POLL_PODLESS)


def _suspended(p: Pass, *, delete: bool = False, apply: Object | None = None) -> Plan:
    alive = [pod for pod in (*p.seen.former, *p.seen.pods) if not ended(pod)]
    message, stuck = "Suspended by spec.suspend.", None
    if alive:
        message = f"Suspended by spec.suspend; pod {alive[-1]['metadata']['name']} saves a checkpoint and ends."
        stuck = lost(alive[-1], p.now)
    said = stuck or Trouble("Suspended", message)
    retry_at = p.status.next_retry_time
    if retry_at is not None:  # who resumes it may have mended something, and waits for no more of a delay of hours
        retry_at = min(retry_at, stamp(_soonest(p)))
    status = going_on(p, "Suspended", said.reason, said.message, suspended=True, next_retry_time=retry_at)
    return plan(
        status,
        *(_first(p, stuck) if stuck else ()),
        delete=(p.job_key,) if delete else (),
        apply=(apply,) if apply else (),
        requeue=POLL_STARTING if alive else None,
    )


def _with_job(p: Pass, job: Object) -> Plan:
    inputs = (job["metadata"].get("annotations") or {}).get(ANNOTATION_INPUTS) or p.status.inputs
    begun = p.status.start_time
    if begun is None and any(running(pod) or ended(pod) for pod in p.seen.pods):
        begun = p.seen.pods[0]["metadata"]["creationTimestamp"]
    noted = p.status.model_copy(
        update={
            "retries": p.status.retries + (p.status.next_retry_time is not None),
            "next_retry_time": None,
            "inputs": inputs,
            "start_time": begun,
            "attempts": int((job.get("status") or {}).get("failed") or 0),
        }
    )
    p = Pass(p.obj, p.spec, noted, p.seen, p.now)
    over = conclude(p, job)
    if over is not None:
        return over
    if job["metadata"].get("deletionTimestamp"):
        status = going_on(p, "Pending", "JobDeleted", "The Job was deleted; another one follows.")
        return plan(status, requeue=POLL_PODLESS)
    if p.spec.suspend and queue_of(job, p.spec):
        return _suspended(p, delete=True)  # a queued Job's suspend is Kueue's; without the Job nothing is queued
    change = revised(job, p.spec, suspended=_was_suspended(p, job))
    found = _suspended(p, apply=change) if p.spec.suspend else _on_its_way(p, job, change)
    return replace(found, events=(*found.events, *_stopped(p, found)))


def _on_its_way(p: Pass, job: Object, change: Object | None) -> Plan:
    """Decide on a Job that is not over. A change that is refused hides nothing of the run."""
    apply = (change,) if change else ()
    failure = _last_failure(p)
    news = () if failure is None or failure == p.status.last_failure else (_attempt_failed(failure),)
    tried: dict[str, Any] = {"last_failure": failure, "retries": retries(p, failure)}
    pod = next((pod for pod in reversed(p.seen.pods) if not ended(pod)), None)
    if pod is not None and pod["metadata"].get("deletionTimestamp"):
        message = f"Pod {pod['metadata']['name']} is being stopped; the next one goes on from its checkpoint."
        stuck = lost(pod, p.now) or Trouble("PodTerminating", message)
        status = going_on(p, "Pending", stuck.reason, stuck.message, **tried)
        return plan(status, *news, *_first(p, stuck), apply=apply, requeue=POLL_STARTING, keep_going=True)
    if pod is not None and running(pod):
        message = f"Pod {pod['metadata']['name']} runs."
        status = going_on(p, "Running", "Running", message, progress=progress(p), **tried)
        return plan(status, *news, apply=apply, requeue=_poll_running(p), keep_going=True)
    if held(job, p.spec, suspended=_was_suspended(p, job)):
        queue = queue_of(job, p.spec)
        message = f"Waits in queue {queue} to be admitted." if queue else _HELD
        return plan(going_on(p, "Queued", "Queued", message, **tried), *news, apply=apply, keep_going=True)
    resumed = bool(job["spec"].get("suspend"))  # by the change: where that is refused, nothing else is to be told
    if pod is not None:
        trouble = trouble_of(pod) or told(pod, p.seen.events)
    else:
        trouble = (held_up(p.seen.pods[-1], p.now) if p.seen.pods else None) or _refused(p, job)
    poll = conditions.patiently(POLL_STARTING if pod else POLL_PODLESS, p.status.conditions, p.now)
    if trouble is not None:
        if trouble.reason in NO_IMAGE and _image_changed(p, job):
            return _again(p)
        message = trouble.message
        known = conditions.find(p.status.conditions, conditions.READY)
        if trouble.reason == "ImagePullBackOff" and known and known.reason == trouble.reason:
            message = known.message  # the kubelet says two things in turns; the first one has the cause
        status = going_on(p, "Pending", trouble.reason, message, **tried)
        return plan(status, *news, *_first(p, trouble), apply=apply, requeue=poll, keep_going=not resumed)
    reason, message = "Starting", "The pod starts."
    if failure is not None:
        reason = "Retrying"
        message = f"Attempt {p.status.attempts + 1} of {p.spec.backoff_limit + 1} starts; before: {failure.message}"
    status = going_on(p, "Pending", reason, message, **tried)
    return plan(status, *news, apply=apply, requeue=poll, keep_going=not resumed)


def _was_suspended(p: Pass, job: Object) -> bool:
    """Whether the Job was there when the object was suspended; one that is younger was made to run."""
    said = conditions.find(p.status.conditions, conditions.SUSPENDED)
    return said is not None and said.status == "True" and created(job) <= parse(said.last_transition_time)


def _poll_running(p: Pass) -> float:
    """Seconds until the next look at the progress; the pod's end is told by an event."""
    age = p.now - parse(p.status.start_time) if p.status.start_time else timedelta()
    return max(POLL_RUNNING, min(age.total_seconds() / 20, POLL_RUNNING_MAX))


def _image_changed(p: Pass, job: Object) -> bool:
    """Whether the operator has another image by now: a Job keeps the one that it was made with."""
    before = (job["metadata"].get("annotations") or {}).get(ANNOTATION_IMAGE)
    return before is not None and before != p.seen.image


def _first(p: Pass, trouble: Trouble) -> tuple[Event, ...]:
    """Its Event, where the object does not say so already; merely taking time is no trouble."""
    known = conditions.find(p.status.conditions, conditions.READY)
    if trouble.reason == "PodTerminating" or (known and known.reason == trouble.reason):
        return ()
    if known and known.message.startswith(cut(trouble.message)):  # with a change that was refused
        return ()
    return (Event(trouble.reason, trouble.message, warning=True),)


def _last_failure(p: Pass) -> Failure | None:
    """Why the last pod failed; a pod that was merely stopped did not fail."""
    for pod in reversed(p.seen.pods):
        found = failure_of(pod)
        if found is not None and found.reason != INTERRUPTED:
            return found
    return p.status.last_failure


def _stopped(p: Pass, found: Plan) -> tuple[Event, ...]:
    """What a pod said at its end that was merely stopped: up to where it was saved, and why not beyond.

    Told once, by the first plan whose status speaks of that pod no more.
    """
    known = conditions.find(p.status.conditions, conditions.READY)
    last = next((pod for pod in reversed(p.seen.pods) if ended(pod)), None)
    if last is None or known is None or last["metadata"]["name"] not in known.message:
        return ()
    then = conditions.find(Status.model_validate(found.status).conditions, conditions.READY)
    failure = failure_of(last)
    if then is None or last["metadata"]["name"] in then.message or failure is None or failure.reason != INTERRUPTED:
        return ()
    return (Event(INTERRUPTED, failure.message, warning=True),)


def _attempt_failed(failure: Failure) -> Event:
    return Event("AttemptFailed", f"{failure.reason}: {failure.message}", warning=True)


def _refused(p: Pass, job: Object) -> Trouble | None:
    """Why the Job's controller could not create the pod: only an Event of it says so."""
    uid, second = job["metadata"]["uid"], timedelta(seconds=1)
    since = (
        created(p.seen.pods[-1]) + second if p.seen.pods else created(job) - second
    )  # what came after is of the next
    for event in reversed(p.seen.events):
        about = (event.get("involvedObject") or {}).get("uid")
        when = event.get("lastTimestamp") or event.get("eventTime") or stamp(p.now)
        if about != uid or event.get("reason") != "FailedCreate" or parse(when) < since:
            continue
        # Each try has a new random name: with it in the message every try would be a status write.
        said = _POD_FORBIDDEN.sub("", str(event.get("message") or "").removeprefix("Error creating: "))
        if over_quota(said):
            return Trouble("QuotaExceeded", f"The namespace's quota forbids the pod: {said}")
        if "serviceaccount" in said and "not found" in said:
            return Trouble("ServiceAccountNotFound", f"The namespace's ServiceAccount is missing: create it. ({said})")
        return Trouble("PodRefused", f"The pod cannot be created: {said}")
    return None
