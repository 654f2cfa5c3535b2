"""The demo's own pods: seeding, traffic, measuring. Their code lies in a ConfigMap; Pod Security restricted is met."""

import json
from pathlib import Path

from kit.kubectl import ROOT, Kubectl, Object, TimedOut, wait_for

CODE = "demo-code"
FILES = (
    "demo/__init__.py",
    "demo/phrases.py",
    "demo/task.py",
    "demo/seed.py",
    "demo/bench.py",
    "demo/traffic.py",
    "kit/__init__.py",
    "kit/traffic.py",
)
LIMITS = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}


def code(root: Path = ROOT / "e2e") -> Object:
    """The ConfigMap with FILES; a key has no slashes, the volume puts them back."""
    data = {name.replace("/", "."): (root / name).read_text(encoding="utf-8") for name in FILES}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CODE}, "data": data}


def pod(name: str, image: str, module: str, *args: str, env: dict[str, str]) -> Object:
    """A pod that runs `python3 -m module args` with the code of the ConfigMap beside the image's own."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "slmops-demo"}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 10,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "command": ["python3", "-m", module, *args],
                    "env": [
                        {"name": key, "value": value}
                        for key, value in {
                            "PYTHONPATH": "/opt/slmops:/code",
                            "PYTHONUNBUFFERED": "1",
                            "HOME": "/tmp",
                            **env,
                        }.items()
                    ],
                    "resources": LIMITS,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "code", "mountPath": "/code"}, {"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [
                {
                    "name": "code",
                    "configMap": {"name": CODE, "items": [{"key": f.replace("/", "."), "path": f} for f in FILES]},
                },
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }


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
    done = kube.run("get", "pod", name, "--ignore-not-found")
    try:
        return kube.run("logs", name, "--tail=25")
    except Exception as error:  # noqa: BLE001  # this text is part of another error: it must not hide that one
        return f"{done}{error}"


def last_json(lines: list[str]) -> Object:
    """The last line that is a JSON object. Raises ValueError if none is."""
    for line in reversed(lines):
        if line.startswith("{"):
            value: Object = json.loads(line)
            return value
    raise ValueError("the pod printed no result")
