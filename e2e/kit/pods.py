"""Pods that are admitted under Pod Security `restricted`: the kit's own, the scenarios' and the demo's."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from kit.kubectl import ROOT, Kubectl, KubectlError, Object, TimedOut, wait_for

USER = 65532
POD_SECURITY: Object = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
TMP = "/tmp"
TELL_SECONDS = 20.0


def spec(
    image: str,
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    mounts: dict[str, Object] | None = None,
    token: bool = False,
    restart: str = "Never",
    **container: object,
) -> Object:
    """A PodSpec with one container `main`, a writable /tmp, and a volume for each path of `mounts`.

    `mounts`: absolute path -> volume source, for example {"/data": {"persistentVolumeClaim": {"claimName": "data"}}};
    `container`: more fields of the container, or others for its own.
    """
    volumes = {TMP: {"emptyDir": {}}, **(mounts or {})}
    named = {path: f"v{number}" for number, path in enumerate(volumes)}
    return {
        "restartPolicy": restart,
        "automountServiceAccountToken": token,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 5,
        "securityContext": POD_SECURITY,
        "containers": [
            {
                "name": "main",
                "image": image,
                "command": command,
                "env": [{"name": name, "value": value} for name, value in {"HOME": TMP, **(env or {})}.items()],
                "securityContext": CONTAINER_SECURITY,
                "volumeMounts": [{"name": name, "mountPath": path} for path, name in named.items()],
                **container,
            }
        ],
        "volumes": [{"name": named[path], **source} for path, source in volumes.items()],
    }


def pod(name: str, pod_spec: Object) -> Object:
    """A Pod, labelled app=<name>."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": pod_spec}


def served(name: str, pod_spec: Object, port: int, *, replicas: int = 1) -> list[Object]:
    """A Deployment of one-container pods that are ready when `port` is open, behind a Service `name`."""
    labels = {"app": name}
    probe = {"tcpSocket": {"port": port}, "periodSeconds": 1}
    container = {**pod_spec["containers"][0], "readinessProbe": probe}
    template = {
        "metadata": {"labels": labels},
        "spec": {**pod_spec, "restartPolicy": "Always", "containers": [container]},
    }
    deployment = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": labels, "ports": [{"port": port}]},
        },
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": deployment},
    ]


def config_map(name: str, data: dict[str, str]) -> Object:
    """A ConfigMap."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def code_map(name: str, files: tuple[str, ...], root: Path = ROOT / "e2e") -> Object:
    """A ConfigMap with `files` below `root`; a key has no slashes, `code_volume` puts them back."""
    return config_map(name, {file.replace("/", "."): (root / file).read_text(encoding="utf-8") for file in files})


def code_volume(name: str, files: tuple[str, ...]) -> Object:
    """The volume source of a `code_map`."""
    return {"configMap": {"name": name, "items": [{"key": file.replace("/", "."), "path": file} for file in files]}}


def phase(kube: Kubectl, name: str) -> str:
    """Pending, Running, Succeeded, Failed; empty while there is no pod."""
    return str(((kube.get("pod", name) or {}).get("status") or {}).get("phase", ""))


def finish(kube: Kubectl, name: str, timeout: float, tell: Callable[[str], None] | None = None) -> list[str]:
    """The log's lines once the pod has succeeded. Raises TimedOut with the end of its log if it failed, hangs or goes.

    What kubectl could not ask is asked again until the time is over. `tell` gets the pod's newest line every
    TELL_SECONDS.
    """
    seen, told = "", time.monotonic()

    def ended() -> tuple[str, list[str]] | None:
        nonlocal seen, told
        if tell and time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            tell(f"pod/{name} {seen}: {tail(kube, name, 1)}")
        try:
            before, seen = seen, phase(kube, name)
            if before and not seen:
                raise TimedOut(f"pod/{name} was removed before its end")
            if seen == "Succeeded":
                return seen, kube.run("logs", name).splitlines()
        except KubectlError:  # an API server that is busy or starts again: its next answer counts
            return None
        return (seen, []) if seen == "Failed" else None

    try:
        end, lines = wait_for(f"pod/{name} ends", ended, timeout)
    except TimedOut as error:
        raise TimedOut(f"{error}\n{tail(kube, name)}") from None
    if end == "Failed":
        raise TimedOut(f"pod/{name} failed. The end of its log:\n{tail(kube, name)}")
    return lines


def tail(kube: Kubectl, name: str, lines: int = 25) -> str:
    """The last lines of a pod's log, or why there are none."""
    try:
        return kube.run("logs", name, f"--tail={lines}")
    except KubectlError as error:
        return str(error)


def last_json(lines: list[str]) -> Object:
    """The last line that is a JSON object. Raises ValueError if none is."""
    for line in reversed(lines):
        if line.startswith("{"):
            value: Object = json.loads(line)
            return value
    raise ValueError("the pod printed no result")
