"""Pods that are admitted under Pod Security `restricted`: the kit's own, the scenarios' and the demo's."""

import json
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


def finish(kube: Kubectl, name: str, timeout: float) -> list[str]:
    """The log's lines once the pod has succeeded. Raises TimedOut with the end of its log if it failed or hangs."""
    try:
        end = wait_for(f"pod/{name} ends", lambda: (p := phase(kube, name)) in ("Succeeded", "Failed") and p, timeout)
    except TimedOut as error:
        raise TimedOut(f"{error}\n{tail(kube, name)}") from None
    if end == "Failed":
        raise TimedOut(f"pod/{name} failed. The end of its log:\n{tail(kube, name)}")
    return kube.run("logs", name).splitlines()


def tail(kube: Kubectl, name: str) -> str:
    """The last lines of a pod's log, or why there are none."""
    try:
        return kube.run("logs", name, "--tail=25")
    except KubectlError as error:
        return str(error)


def last_json(lines: list[str]) -> Object:
    """The last line that is a JSON object. Raises ValueError if none is."""
    for line in reversed(lines):
        if line.startswith("{"):
            value: Object = json.loads(line)
            return value
    raise ValueError("the pod printed no result")
