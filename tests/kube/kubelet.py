"""The parts of Kubernetes that are not there: the Job controller and the kubelet, played by hand or by a thread."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.kube.api import Api, ApiError, Object
from tests.kube.looking import Looking

from slmops.api.times import stamp

RESULT = {
    "succeeded": True,
    "artifact": {"uri": "oci://s/x@sha256:aa", "digest": "sha256:aa", "sizeBytes": 1},
    "format": "safetensors",
    "lineage": [{"kind": "model", "uri": "oci://r/base:1", "digest": "sha256:bb"}],
    "metrics": {"exactMatch": 0.5},
    "quality": "exactMatch 0.500",
}


def now() -> str:
    return stamp(datetime.now(UTC))


def make_pod(api: Api, job: Object, name: str = "") -> str:
    """A pod of the Job, as its controller makes it."""
    name = name or f"{job['metadata']['name'][:50]}-{job['metadata']['uid'][:5]}"
    template = job["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    metadata = {"labels": template["metadata"]["labels"], "ownerReferences": [{**owner, "controller": True}]}
    api.create("Pod", name, metadata=metadata, spec=template["spec"])
    return name


def set_pod(api: Api, name: str, phase: str, state: Object | None = None, **more: Any) -> None:
    """The pod's status, as the kubelet writes it."""
    status: Object = {"phase": phase, **more}
    if state is not None:
        container = {"name": "worker", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        status["containerStatuses"] = [container]
    api.patch("Pod", name, {"status": status}, "status")


def running() -> Object:
    return {"running": {"startedAt": now()}}


def exited(code: int, result: Object | None = None, reason: str = "Error") -> Object:
    message = json.dumps(result) if result else ""
    said = {"exitCode": code, "reason": reason, "message": message, "startedAt": now(), "finishedAt": now()}
    return {"terminated": said}


def finish_pod(api: Api, name: str, result: Object | None = None) -> None:
    set_pod(api, name, "Succeeded", exited(0, result or RESULT, "Completed"))


def fail_pod(api: Api, name: str, code: int, reason: str, message: str = "") -> None:
    said = {"succeeded": False, "reason": reason, "message": message}
    set_pod(api, name, "Failed", exited(code, said))


def fail_job(api: Api, name: str, reason: str = "BackoffLimitExceeded", failed: int = 4) -> None:
    """The Job's status once it has given up."""
    conditions = [
        {"type": kind, "status": "True", "reason": reason, "message": "m", "lastTransitionTime": now()}
        for kind in ("FailureTarget", "Failed")
    ]
    status = {"startTime": now(), "failed": failed, "conditions": conditions, "uncountedTerminatedPods": {}}
    api.patch("Job", name, {"status": status}, "status")


def complete_job(api: Api, name: str) -> None:
    """The Job's status once it is through."""
    conditions = [
        {"type": kind, "status": "True", "reason": "CompletionsReached", "lastTransitionTime": now()}
        for kind in ("SuccessCriteriaMet", "Complete")
    ]
    times = {"startTime": now(), "completionTime": now()}
    status = {**times, "succeeded": 1, "conditions": conditions, "uncountedTerminatedPods": {}}
    api.patch("Job", name, {"status": status}, "status")


class Kubelet(Looking):
    """A thread that runs every Job of the namespace to a good end; `with` starts and stops it."""

    def __init__(self, api: Api, result: Callable[[Object], Object] = lambda job: RESULT) -> None:
        super().__init__(api)
        self.result = result
        self.jobs_seen: dict[str, set[str]] = {}  # name -> uids

    def look(self) -> None:
        """Give every Job that has none yet a pod that ends well."""
        pods = {pod["metadata"]["ownerReferences"][0]["uid"]: pod for pod in self.api.list("Pod")}
        for job in self.api.list("Job"):
            self.jobs_seen.setdefault(job["metadata"]["name"], set()).add(job["metadata"]["uid"])
            if job["spec"].get("suspend") or job["metadata"].get("deletionTimestamp"):
                continue
            pod = pods.get(job["metadata"]["uid"])
            try:
                self._advance(job, pod)
            except ApiError as error:
                if error.status != 404:  # the operator removed the Job meanwhile
                    raise

    def _advance(self, job: Object, pod: Object | None) -> None:
        if pod is None:
            make_pod(self.api, job)
            return
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        if status.get("phase") == "Succeeded":
            if not (job.get("status") or {}).get("completionTime"):
                complete_job(self.api, job["metadata"]["name"])
        elif not status.get("containerStatuses"):
            set_pod(self.api, name, "Running", running())
        else:
            finish_pod(self.api, name, self.result(job))
