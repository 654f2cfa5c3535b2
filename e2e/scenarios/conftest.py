"""The installed chart on the local node, a namespace for each test, and tiny models to work with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import chart
from kit.kubectl import Kubectl, Object, TimedOut, wait_for
from kit.objects import REGISTRY, STORE

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    """References of the images built here."""
    return chart.local_images()


@pytest.fixture(scope="session")
def installed(images: dict[str, str]) -> Kubectl:
    """The chart, installed; kubectl in its namespace."""
    kube = Kubectl(chart.NAMESPACE)
    chart.install(kube, images=images)
    return kube


@pytest.fixture
def space(request: pytest.FixtureRequest, installed: Kubectl) -> Iterator[Kubectl]:
    """kubectl in an empty namespace under Pod Security restricted, removed afterwards unless the test failed."""
    name = "e2e-" + request.node.name.removeprefix("test_").replace("_", "-")[:40].rstrip("-")
    kube = installed.within(name)
    kube.delete("namespace", name)
    kube.apply(chart.namespace(name))
    before = request.session.testsfailed
    yield kube
    if request.session.testsfailed == before:
        kube.delete("namespace", name, wait=False)


def worker_pod(name: str, image: str, command: list[str], files: str) -> Object:
    """A restricted pod of the trainer image with a ConfigMap's files at /files."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "Never",
                    "command": command,
                    "env": [{"name": "SLMOPS_PLAIN_HTTP", "value": REGISTRY}, {"name": "HOME", "value": "/tmp"}],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "files", "mountPath": "/files"}, {"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "files", "configMap": {"name": files}}, {"name": "tmp", "emptyDir": {}}],
        },
    }


@pytest.fixture(scope="session")
def seeded(installed: Kubectl, images: dict[str, str]) -> str:
    """The root of the tiny artifacts: <root>/base:tiny and <root>/data:tiny."""
    kube = installed.within("e2e-seed")
    kube.delete("namespace", "e2e-seed")
    kube.apply(chart.namespace("e2e-seed"))
    kube.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "seed"},
            "data": {"seed_tiny.py": (HERE / "seed_tiny.py").read_text(encoding="utf-8")},
        }
    )
    kube.apply(worker_pod("seed", images["trainer"], ["python", "/files/seed_tiny.py", STORE], "seed"))

    def phase() -> str:
        return str((kube.get("pod", "seed") or {}).get("status", {}).get("phase", ""))

    end = wait_for("the seed pod ends", lambda: (p := phase()) in ("Succeeded", "Failed") and p, timeout=180)
    if end == "Failed":
        raise TimedOut("seeding failed: " + kube.run("logs", "seed"))
    kube.delete("namespace", "e2e-seed", wait=False)
    return STORE
