"""What the pods of a revision, or of the router, say of themselves when they are not ready."""

import json
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from slmops.api.times import parse
from slmops.cluster.port import Object
from slmops.reconcile.conditions import cut
from slmops.reconcile.pods import NO_STATUS, created, failure_of, is_over, over_quota, told, unscheduled
from slmops.rollout.seen import NO_ROOM, Problem

_IMAGE = {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
# What the pulling container (slmops_artifacts) says, by the names that it has in docs/errors.md.
PULLED = {"DigestMismatch": "SourceUnavailable", "UnsupportedFormat": "UnsupportedModel", "BadUri": "BadSpec"}
_BY_NODE = ("DiskFull", "Evicted", "NodeRefused")
LATELY = timedelta(minutes=15)  # so long may the next one need to come as far
SAID_MAX = 400  # characters of what a container said


def is_ready(pod: Object) -> bool:
    """Whether the pod is Ready and not on its way out."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def drains(pod: Object, now: datetime) -> bool:
    """Whether the pod was told to end and still has time to answer what it is asked."""
    gone_by = pod["metadata"].get("deletionTimestamp")
    return gone_by is not None and now < parse(gone_by)


def problem_of(deployment: Object, pods: Iterable[Object]) -> Problem | None:
    """Why pods of `deployment` are missing or not ready; None where they just take their time.

    What forbids pods altogether comes first, then what each pod says, its containers in the order in which they start.
    Before all stands what pods do by themselves: that others have no room would mend itself, and would hide it.
    """
    found = [_forbidden(deployment), *map(_problem, _missed(pods))]
    problems = [problem for problem in found if problem is not None]
    return next((problem for problem in problems if problem.reason not in NO_ROOM), next(iter(problems), None))


def _forbidden(deployment: Object) -> Problem | None:
    for condition in (deployment.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            said = str(condition.get("message"))
            if over_quota(said):
                return Problem("QuotaExceeded", cut(f"The namespace's quota forbids the pods: {said}"))
            return Problem("PodsForbidden", cut(f"The API server refuses the pods: {said}"))
    return None


def imageless(pods: Iterable[Object]) -> bool:
    """Whether no pod can come to serve for want of its image: some lack it, and all others have no node."""
    placed = [pod for pod in _living(pods) if unscheduled(pod) is None]
    problems = [_problem(pod) for pod in placed]
    return bool(problems) and all(found is not None and found.reason == "ImagePullFailed" for found in problems)


def fell(pods: Collection[Object], since: str | None) -> bool:
    """Whether a pod that had started is not ready by its own doing: it ended, or says that it cannot answer.

    One that was deleted or evicted does not count, but for its own disk limit since that time; nor its successor that
    has not started yet; and a node that is gone makes a pod not ready, but none of its containers.
    """
    said = [pod.get("status") or {} for pod in _living(pods)]
    ends = [failure_of(pod) for pod in _staying(pods) if is_over(pod)]
    return any(_fell(container) for status in said for container in status.get("containerStatuses") or []) or any(
        end is not None and end.reason == "DiskFull" and since is not None and parse(end.time) >= parse(since)
        for end in ends
    )


def mute(pods: Iterable[Object]) -> Object | None:
    """The oldest pod that has not come to its first container and does not say why: Events may."""
    waiting = [pod for pod in _missed(pods) if not (is_over(pod) or _begun(pod)) and _problem(pod) is None]
    return min(waiting, key=created, default=None)


def by_events(pod: Object, events: Iterable[Object]) -> Problem | None:
    """What Events, oldest first, tell of a mute pod."""
    found = told(pod, events)
    return Problem(found.reason, cut(found.message)) if found else None


def ended_lately(pods: Iterable[Object], now: datetime) -> Problem | None:
    """Why the last pod ended, where that was its node's doing: the one in its place may meet the same end."""
    failures = [found for pod in pods if is_over(pod) and (found := failure_of(pod)) and found.reason in _BY_NODE]
    last = max(failures, key=lambda found: found.time, default=None)
    return Problem(last.reason, last.message) if last and now < parse(last.time) + LATELY else None


def _missed(pods: Iterable[Object]) -> list[Object]:
    """Pods that shall be ready and are not. One that has ended is heard only where nobody has taken its place."""
    staying = _staying(pods)
    return [pod for pod in _living(staying) or staying if not is_ready(pod)]


def _staying(pods: Iterable[Object]) -> list[Object]:
    return [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]


def _living(pods: Iterable[Object]) -> list[Object]:
    return [pod for pod in _staying(pods) if not is_over(pod)]


def _begun(pod: Object) -> bool:
    states = [container.get("state") or {} for container in _containers(pod)]
    return any("running" in state or "terminated" in state for state in states)


def _containers(pod: Object) -> list[Object]:
    """What the pod's containers say, in the order in which they start."""
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _problem(pod: Object) -> Problem | None:
    nowhere = unscheduled(pod)
    if nowhere:
        return Problem(nowhere.reason, cut(nowhere.message))
    for container in _containers(pod):
        found = _container(container)
        if found:
            return found
    # Of a server, to end well is to end: it was killed by its own probe, or is none.
    serving = [] if is_over(pod) else (pod.get("status") or {}).get("containerStatuses") or []
    return next((_died(container, end) for container in serving if (end := _end(container))), None)


def _container(container: Object) -> Problem | None:
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    reason, said = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _IMAGE:
        return Problem("ImagePullFailed", cut(f"Image {container.get('image')} cannot be pulled: {said or reason}"))
    if reason in _CONFIG:
        return Problem(reason, cut(f"The container cannot start: {said or reason}"))
    ended = _end(container)
    if ended.get("exitCode", 0) == 0 and reason != "CrashLoopBackOff":  # which is also said of one that just ends
        return None
    return _died(container, ended)


def _fell(container: Object) -> bool:
    if container.get("ready"):
        return False
    ended = _end(container)
    return bool(container.get("started") or (ended and ended.get("reason") not in NO_STATUS))


def _end(container: Object) -> Object:
    """How the container ended, or ended last; empty for one that never did."""
    found: Object = (container.get("state") or {}).get("terminated") or {}
    return found or (container.get("lastState") or {}).get("terminated") or {}


def _died(container: Object, ended: Object) -> Problem:
    said = str(ended.get("message") or "").strip()
    try:
        told = json.loads(said)
        reason = str(told["reason"])
        return Problem(PULLED.get(reason, reason), cut(str(told["message"])))
    except (ValueError, TypeError, KeyError):
        pass
    name, code = container.get("name"), ended.get("exitCode")
    if ended.get("reason") in NO_STATUS:
        return Problem("NodeFailed", f"Container {name} ended with its node, as when that is started anew.")
    if ended.get("reason") == "OOMKilled":
        return Problem("OutOfMemory", f"Container {name} hit its memory limit: raise spec.pod.resources.limits.memory.")
    last = f": {said.splitlines()[-1][-SAID_MAX:]}" if said else ""  # of a log or a traceback, the last line says it
    return Problem("CrashLoopBackOff", cut(f"Container {name} ends with exit code {code}{last}"))
