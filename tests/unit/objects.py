"""Builders: objects as the API server would hold them, small unless a test asks for more."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from slmops.api import keys
from slmops.api.times import stamp
from slmops.build import parts
from slmops.build.job import job_name

Object = dict[str, Any]

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
UID = "11111111-2222-3333-4444-555555555555"
ARTIFACT = {"uri": "oci://store:5000/ns/out@sha256:aa", "digest": "sha256:aa", "sizeBytes": 10}


def at(seconds: float) -> str:
    """A time relative to NOW, as Kubernetes writes it."""
    return stamp(NOW + timedelta(seconds=seconds))


def ours(kind: str, spec: Object, *, name: str = "tune", status: Object | None = None, generation: int = 1) -> Object:
    """One of our objects."""
    metadata = {"name": name, "namespace": "ns", "uid": UID, "generation": generation, "creationTimestamp": at(-600)}
    obj: Object = {"apiVersion": keys.API_VERSION, "kind": kind, "metadata": metadata, "spec": spec}
    obj["status"] = {"observedGeneration": -1} if status is None else status
    return obj


def finetune(status: Object | None = None, *, generation: int = 1, name: str = "tune", **spec: Any) -> Object:
    """A FineTuneJob of a model and a dataset from a registry."""
    whole = {"base": {"uri": "oci://r/base:1"}, "dataset": {"uri": "oci://r/data:1"}, **spec}
    return ours("FineTuneJob", whole, name=name, status=status, generation=generation)


def job(owner: Object, *, age: float = 60, conditions: list[Object] | None = None, **more: Any) -> Object:
    """The Job of `owner`, made `age` seconds before NOW."""
    metadata = parts.metadata(owner, job_name(owner), keys.ROLE_WORKER)
    metadata |= {"uid": more.pop("uid", "job-1"), "resourceVersion": "7", "creationTimestamp": at(-age)}
    metadata["annotations"] = {"slmops.dev/inputs": more.pop("inputs", "m1.s1"), **more.pop("annotations", {})}
    if "image" in more:
        metadata["annotations"]["slmops.dev/image"] = more.pop("image")
    if more.pop("deleting", False):
        metadata["deletionTimestamp"] = at(0)
    spec = {"backoffLimit": 3, "suspend": False, "template": {"spec": {"containers": []}}, **more.pop("spec", {})}
    return {"kind": "Job", "metadata": metadata, "spec": spec, "status": {"conditions": conditions or [], **more}}


def condition(kind: str, reason: str = "", message: str = "", status: str = "True") -> Object:
    """A condition of a Job or a Pod."""
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at(-5)}


def pod(
    owner: Object,
    *,
    name: str = "tune-abc",
    age: float = 50,
    state: Object | None = None,
    phase: str = "Running",
    of: str = "job-1",
    limits: Object | None = None,
    **status: Any,
) -> Object:
    """A worker pod; `state` is its container's."""
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"pod-{name}",
            "labels": parts.labels(owner, keys.ROLE_WORKER),
            "ownerReferences": [{"kind": "Job", "uid": of, "name": job_name(owner)}],
            "creationTimestamp": at(-age),
        },
        "spec": {"containers": [{"name": "worker", "image": "trainer:1", "resources": {"limits": limits or {}}}]},
        "status": {
            "phase": phase,
            "podIP": "10.0.0.9",
            "containerStatuses": [{"name": "worker", "state": state}] if state else [],
            **status,
        },
    }


RUNNING: Object = {"running": {"startedAt": at(-40)}}


def waiting(reason: str, message: str = "") -> Object:
    """The state of a container that has not started."""
    return {"waiting": {"reason": reason, "message": message}}


def exited(code: int, *, reason: str = "Error", message: str = "") -> Object:
    """The state of a container that ended."""
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": at(-5)}}


def said(reason: str, message: str, code: int) -> Object:
    """The state of a worker that ended badly and said why."""
    result = {"succeeded": False, "reason": reason, "message": message}
    return exited(code, message=json.dumps(result))


def succeeded(**more: Any) -> Object:
    """The state of a worker that ended well."""
    result = {"succeeded": True, "artifact": ARTIFACT, "format": "safetensors", "quality": "0.97", **more}
    return exited(0, reason="Completed", message=json.dumps(result))


def of(obj: Object, kind: str) -> Object | None:
    """The condition of this type in the object's status."""
    found: list[Object] = [c for c in obj["status"].get("conditions", []) if c["type"] == kind]
    return found[0] if found else None
