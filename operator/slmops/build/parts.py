"""Pieces that manifests share: labels, owner references, the security context, what users may set on pods."""

from typing import Any

from slmops.api import keys
from slmops.api.meta import Pod

Object = dict[str, Any]  # a manifest, or a piece of one

USER = 65532  # "nonroot" of distroless images, and of ours

# Pod Security "restricted" wants all of these; GPUs come through the device plugin and need none of what is dropped.
POD_SECURITY: Object = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


def labels(owner: Object, role: str) -> dict[str, str]:
    """Labels of a child of `owner`: by these it is watched and selected."""
    return {
        keys.LABEL_MANAGED_BY: keys.MANAGED_BY,
        keys.LABEL_KIND: owner["kind"],
        keys.LABEL_OWNER: keys.label_value(owner["metadata"]["name"]),
        keys.LABEL_OWNER_UID: owner["metadata"]["uid"],
        keys.LABEL_ROLE: role,
    }


def owner_reference(owner: Object) -> Object:
    """Reference by which a child goes when its owner goes."""
    return {
        "apiVersion": keys.API_VERSION,
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def metadata(owner: Object, name: str, role: str, more: dict[str, str] | None = None) -> Object:
    """Metadata of a child called `name`, with `more` labels."""
    return {
        "name": name,
        "namespace": owner["metadata"]["namespace"],
        "labels": labels(owner, role) | (more or {}),
        "ownerReferences": [owner_reference(owner)],
    }


def placement(pod: Pod | None) -> Object:
    """What users may set on a pod apart from its container: the fields of a PodSpec."""
    if pod is None:
        return {}
    fields: Object = {
        "nodeSelector": pod.node_selector,
        "tolerations": [toleration.wire() for toleration in pod.tolerations or []],
        "priorityClassName": pod.priority_class_name,
        "runtimeClassName": pod.runtime_class_name,
        "imagePullSecrets": [secret.wire() for secret in pod.image_pull_secrets or []],
    }
    return {name: value for name, value in fields.items() if value}


def resources(pod: Pod | None) -> Object:
    """Requests and limits of the container."""
    return pod.resources.wire() if pod and pod.resources else {}


def environment(ours: dict[str, str], pod: Pod | None) -> list[Object]:
    """Our variables, then the user's; a name that both set has the user's value, except for SLMOPS_*."""
    theirs = {var.name: var.value for var in (pod.env if pod else None) or [] if not var.name.startswith("SLMOPS_")}
    return [{"name": name, "value": literal(value)} for name, value in (ours | theirs).items()]


def probe(path: str, port: str, period: int, failures: int) -> Object:
    """A probe over HTTP every `period` seconds; after `failures` in a row the container is not well."""
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def literal(text: str) -> str:
    """Escape a variable's value or an argument so that the container gets `text`.

    The kubelet puts other variables in the place of $(NAME) and makes one $ of two: prompts hold both.
    """
    return text.replace("$", "$$")
