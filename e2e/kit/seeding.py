"""Pushes the scenarios' tiny base model and data into the installed registry, by a pod of the trainer image."""

from pathlib import Path

from kit import chart
from kit.kubectl import Kubectl, Object, TimedOut, wait_for
from kit.objects import REGISTRY, STORE

SCRIPT = Path(__file__).resolve().parents[1] / "scenarios/seed_tiny.py"
NAMESPACE = "e2e-seed"


def seed_pod(image: str) -> Object:
    """A restricted pod of the trainer image that runs the script of ConfigMap `seed`."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "seed"},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "Never",
                    "command": ["python", "/files/seed_tiny.py", STORE],
                    "env": [{"name": "SLMOPS_PLAIN_HTTP", "value": REGISTRY}, {"name": "HOME", "value": "/tmp"}],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "files", "mountPath": "/files"}, {"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "files", "configMap": {"name": "seed"}}, {"name": "tmp", "emptyDir": {}}],
        },
    }


def seed(kube: Kubectl) -> str:
    """The root of the tiny artifacts, <root>/base:tiny and <root>/data:tiny, pushed anew. Raises TimedOut."""
    space = kube.within(NAMESPACE)
    space.delete("namespace", NAMESPACE)
    space.apply(chart.namespace(NAMESPACE))
    files = {"seed_tiny.py": SCRIPT.read_text(encoding="utf-8")}
    space.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "seed"}, "data": files})
    space.apply(seed_pod(chart.local_images()["trainer"]))

    def ended() -> str | None:
        phase = str((space.get("pod", "seed") or {}).get("status", {}).get("phase", ""))
        return phase if phase in ("Succeeded", "Failed") else None

    if wait_for("the seed pod ends", ended, timeout=180) == "Failed":
        raise TimedOut("seeding failed: " + space.run("logs", "seed"))
    space.delete("namespace", NAMESPACE, wait=False)
    return STORE
