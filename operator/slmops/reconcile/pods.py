"""What a worker pod says about itself: its result, why it failed, why it does not start. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

from pydantic import ValidationError

from slmops.api.keys import LABEL_ROLE, ROLE_WORKER
from slmops.api.meta import Failure
from slmops.api.run import EXIT_INTERRUPTED, FailureReason, RunResult
from slmops.api.times import parse
from slmops.build.job import CONTAINER
from slmops.cluster.port import Object
from slmops.reconcile.conditions import cut

INTERRUPTED = "Interrupted"
NO_STATUS = ("ContainerStatusUnknown", "Unknown")  # of a container that ended with its node: kubelet's, containerd's
NO_IMAGE = ("ImagePullBackOff", "InvalidImageName")
_OWN_DISK = re.compile("local ephemeral storage limit|ephemeral local storage usage")  # as the kubelet says it
_GOT_ON = ("Scheduled", "SuccessfulAttachVolume", "Pulling", "Pulled")  # Events of a pod on its way
_TRACKED = "batch.kubernetes.io/job-tracking"  # the finalizer of a Job's pods
LATE_SECONDS = 30.0  # a pod that has not started by then is asked why
HELD_AFTER = timedelta(seconds=60)  # the kubelet needs some seconds to say that a pod has ended
LOST_AFTER = timedelta(seconds=60)  # beyond the time by which a deleted pod has to be gone

# Why a container waits, as the kubelet says it -> our reason. Two words for one thing would make the status flap.
_WAITING = {
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "InvalidImageName": "InvalidImageName",
    "ErrImageNeverPull": "ImagePullBackOff",
    "ImageInspectError": "ImagePullBackOff",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "RunContainerError",
    "CrashLoopBackOff": "CrashLoopBackOff",
}


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not start."""

    reason: str
    message: str


def created(obj: Object) -> datetime:
    """When the object was created."""
    return parse(obj["metadata"]["creationTimestamp"])


def is_over(pod: Object) -> bool:
    """Whether all of its containers have ended for good, or the kubelet has given it up."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def ended(pod: Object) -> bool:
    """Whether no container of the pod will run again."""
    return is_over(pod) or terminated(pod) is not None


def ended_well(pod: Object) -> bool:
    """Whether the worker's container ended with exit code 0."""
    return (pod.get("status") or {}).get("phase") == "Succeeded" or (terminated(pod) or {}).get("exitCode") == 0


def running(pod: Object) -> bool:
    """Whether the worker's container runs."""
    return "running" in (_container(pod).get("state") or {})


def result_of(pod: Object) -> RunResult | None:
    """The result in the termination message; None where there is none that can be read."""
    message = (terminated(pod) or {}).get("message") or ""
    try:
        return RunResult.model_validate_json(message)
    except ValidationError:
        return None


def failure_of(pod: Object) -> Failure | None:
    """Why the pod failed; None for one that has not. The same at each look, or each look would be news."""
    end = terminated(pod)
    status = pod.get("status") or {}
    if end is None and status.get("phase") != "Failed":
        return None
    code = (end or {}).get("exitCode")
    if ended_well(pod):
        return None
    reason, message = _named(pod, end or {}, code)
    return Failure(reason=reason, message=cut(message), exit_code=code, time=_end(pod))


def ended_at(pod: Object) -> datetime:
    """When a pod ended."""
    return parse(_end(pod))


def lost(pod: Object, now: datetime) -> Trouble | None:
    """A pod that was deleted and is still there long after its grace period: its node does not answer.

    While its Job is there, the Job's controller keeps a finalizer on a pod that has not failed, so --force removes
    nothing. Of a dead node only the garbage collector of pods says so, once the node is gone or out of service.
    """
    gone_by = pod["metadata"].get("deletionTimestamp")
    if gone_by is None or now < parse(gone_by) + LOST_AFTER:
        return None
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    node = (pod.get("spec") or {}).get("nodeName") or "its node"
    if _TRACKED in (pod["metadata"].get("finalizers") or ()):
        remedy = (
            f"If its machine is off for good: kubectl delete node {node}; if it is off and will come back: "
            f"kubectl taint nodes {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
        )
    else:
        remedy = f"If the node is dead, delete it, or: kubectl -n {namespace} delete pod {name} --force"
    return Trouble(
        "NodeLost",
        f"Pod {name} should have ended by {gone_by}, but {node} does not say so. The run can go on from its checkpoint "
        f"once it has. {remedy}",
    )


def held_up(pod: Object, now: datetime) -> Trouble | None:
    """A pod that does not end though its worker has: a webhook added containers that know of no end."""
    end, status = terminated(pod), pod.get("status") or {}
    if end is None or is_over(pod) or pod["metadata"].get("deletionTimestamp"):
        return None
    if now < parse(end.get("finishedAt") or pod["metadata"]["creationTimestamp"]) + HELD_AFTER:
        return None
    others = [one["name"] for one in status.get("containerStatuses") or [] if "running" in (one.get("state") or {})]
    if not others:
        return None
    name, namespace, which = pod["metadata"]["name"], pod["metadata"]["namespace"], ", ".join(others)
    return Trouble(
        "SidecarRuns",
        f"Pod {name} has done its work, but {which} runs on in it. Keep what adds that away from pods with the label "
        f"{LABEL_ROLE}={ROLE_WORKER}, or make it a native sidecar; then: kubectl -n {namespace} delete pod {name}",
    )


def over_quota(refusal: str) -> bool:
    """Whether the API server refuses it for a quota of the namespace."""
    return "exceeded quota" in refusal


def trouble_of(pod: Object) -> Trouble | None:
    """Why the pod does not start, if it says so."""
    nowhere = unscheduled(pod)
    if nowhere is not None:
        return nowhere
    waiting = (_container(pod).get("state") or {}).get("waiting") or {}
    reason = _WAITING.get(waiting.get("reason", ""))
    if reason is None:
        return None
    said = waiting.get("message") or waiting["reason"]
    if reason in NO_IMAGE:
        image = _asked(pod).get("image")
        return Trouble(reason, f"Image {image} cannot be pulled: {said}")
    return Trouble(reason, f"The container cannot start: {said}")


def unscheduled(pod: Object) -> Trouble | None:
    """Why the scheduler finds no node for the pod; None where it has one, or was not looked at yet."""
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            reason = condition.get("reason") or "Unschedulable"
            said = condition.get("message") or reason
            if "persistentvolumeclaim" in said and "not found" in said:
                return Trouble("ClaimNotFound", f"A PersistentVolumeClaim does not exist: create it. ({said})")
            return Trouble(reason, f"No node takes the pod: {said}")
    return None


def told(pod: Object, events: Iterable[Object]) -> Trouble | None:
    """Why a pod is long in starting, by `events`, oldest first: of volumes and sandboxes the kubelet tells there alone.

    What came before the pod got on is over. All else between the failures is passed over, or the reason would flap.
    """
    for event in reversed(list(events)):
        about, reason = (event.get("involvedObject") or {}).get("uid"), str(event.get("reason"))
        if about != pod["metadata"]["uid"]:
            continue
        if reason in _GOT_ON:
            return None
        if reason.startswith("Failed"):
            return Trouble(reason, f"The pod cannot start: {event.get('message') or reason}")
    return None


def _named(pod: Object, end: Object, code: int | None) -> tuple[str, str]:
    full = _over_its_disk(pod)
    if full is not None:  # whatever else it says comes of that
        return full
    result = result_of(pod)
    if result is not None and result.reason in get_args(FailureReason):
        return result.reason, result.message
    if result is not None and not result.succeeded:  # an image of the user's own
        return "InternalError", f"The container said {cut(result.reason, 64) or 'no reason'}: {result.message}"
    if end.get("reason") == "OOMKilled":
        return "OutOfMemory", _out_of_memory(pod)
    disrupted = _disruption(pod)
    if disrupted is not None:
        return disrupted
    if code == EXIT_INTERRUPTED:
        return INTERRUPTED, "The pod was stopped."
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    status = pod.get("status") or {}
    words = [end["message"]] if end.get("message") else [status.get("reason"), status.get("message")]
    said = "".join(f": {word}" for word in words if word)
    node = (pod.get("spec") or {}).get("nodeName") or "its node"
    if code is None and status.get("reason"):
        return "NodeRefused", f"The kubelet of {node} refused pod {name}{said}"
    if end.get("reason") in NO_STATUS:
        return "NodeFailed", f"The kubelet of {node} lost pod {name}, as when a node is started anew{said}"
    if code is None:
        return "InternalError", f"Pod {name} failed before its container ran{said}"
    log = f"Its log: kubectl -n {namespace} logs {name}"
    return "InternalError", f"The container ended with exit code {code} and gave no reason{said}. {log}"


def _end(pod: Object) -> str:
    return str((terminated(pod) or {}).get("finishedAt") or _left(pod))


def _left(pod: Object) -> str:
    """When a pod failed whose container does not say so: its node was lost, or it never ran."""
    said = {c.get("type"): c.get("lastTransitionTime") for c in (pod.get("status") or {}).get("conditions") or []}
    return str(said.get("DisruptionTarget") or said.get("Ready") or pod["metadata"]["creationTimestamp"])


def _out_of_memory(pod: Object) -> str:
    limit = ((_asked(pod).get("resources") or {}).get("limits") or {}).get("memory")
    what = f"its memory limit of {limit}" if limit else "the memory of its node"
    return (
        f"The container needed more than {what} and was killed. Make a new object with a larger "
        "spec.pod.resources.limits.memory, or with a smaller batch size or length."
    )


def _over_its_disk(pod: Object) -> tuple[str, str] | None:
    """For its own limit a pod is evicted like for its node's full disk, but any other node would do the same."""
    status = pod.get("status") or {}
    said = str(status.get("message") or "")
    if status.get("reason") != "Evicted" or not _OWN_DISK.search(said):
        return None
    remedy = "Raise spec.pod.resources.limits.ephemeral-storage; for a run, in a new object."
    return "DiskFull", f"The pod wrote more than it may: {said.strip()} {remedy}"


def _disruption(pod: Object) -> tuple[str, str] | None:
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            said = status.get("message") or condition.get("message") or condition.get("reason") or ""
            return "Evicted", f"The pod was taken off its node: {said}"
    if status.get("reason") in ("Evicted", "NodeShutdown", "Shutdown", "Terminated", "NodeLost"):
        return "Evicted", f"The pod was taken off its node: {status.get('message') or status['reason']}"
    return None


def _asked(pod: Object) -> Object:
    """The worker's container in the pod's spec: webhooks put theirs before it."""
    return _worker(pod["spec"]["containers"])


def _container(pod: Object) -> Object:
    return _worker((pod.get("status") or {}).get("containerStatuses") or [])


def _worker(containers: list[Object]) -> Object:
    return next((one for one in containers if one.get("name") == CONTAINER), {})


def terminated(pod: Object) -> Object | None:
    """The end of the worker's container; None while it has not ended."""
    found: Object | None = (_container(pod).get("state") or {}).get("terminated")
    return found
