"""The installed chart on the local node, a namespace for each test, and tiny models to work with."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import chart
from kit.kubectl import Kubectl, Object, TimedOut, wait_for

HERE = Path(__file__).parent
REGISTRY = f"{chart.RELEASE}-registry.{chart.NAMESPACE}.svc:5000"
STORE = f"oci://{REGISTRY}/e2e"


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
            "containers": [{
                "name": "main",
                "image": image,
                "imagePullPolicy": "Never",
                "command": command,
                "env": [{"name": "SLMOPS_PLAIN_HTTP", "value": REGISTRY}, {"name": "HOME", "value": "/tmp"}],
                "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                    "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "files", "mountPath": "/files"}, {"name": "tmp", "mountPath": "/tmp"}],
            }],
            "volumes": [{"name": "files", "configMap": {"name": files}}, {"name": "tmp", "emptyDir": {}}],
        },
    }


@pytest.fixture(scope="session")
def seeded(installed: Kubectl, images: dict[str, str]) -> str:
    """The root of the tiny artifacts: <root>/base:tiny and <root>/data:tiny."""
    kube = installed.within("e2e-seed")
    kube.delete("namespace", "e2e-seed")
    kube.apply(chart.namespace("e2e-seed"))
    kube.apply({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "seed"},
        "data": {"seed_tiny.py": (HERE / "seed_tiny.py").read_text(encoding="utf-8")},
    })
    kube.apply(worker_pod("seed", images["trainer"], ["python", "/files/seed_tiny.py", STORE], "seed"))

    def phase() -> str:
        return str((kube.get("pod", "seed") or {}).get("status", {}).get("phase", ""))

    end = wait_for("the seed pod ends", lambda: (p := phase()) in ("Succeeded", "Failed") and p, timeout=180)
    if end == "Failed":
        raise TimedOut("seeding failed: " + kube.run("logs", "seed"))
    kube.delete("namespace", "e2e-seed", wait=False)
    return STORE


# --- the objects that the scenarios apply -------------------------------------------------------------------------

TRAINING = {"maxSteps": 400, "learningRate": 1e-2, "batchSize": 32, "maxLength": 64, "warmupRatio": 0.1}
SMALL_POD = {"resources": {"limits": {"memory": "3Gi"}}, "env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}


def obj(kind: str, name: str, spec: Object) -> Object:
    """One of our objects."""
    return {"apiVersion": "slmops.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def dataset(file: str) -> Object:
    """One of the seeded files."""
    return {"uri": f"{STORE}/data:tiny", "file": file}


def evaluation(**extra: object) -> Object:
    """Evaluation on the seeded held-out set."""
    return {"dataset": dataset("heldout.jsonl"), "metrics": ["exactMatch", "jsonValid"], "maxTokens": 40, **extra}


def finetune(name: str = "teacher", **spec: object) -> Object:
    """A full fine-tune of the tiny base, about half a minute."""
    return obj("FineTuneJob", name, {
        "base": {"uri": f"{STORE}/base:tiny"}, "method": "full", "dataset": dataset("train.jsonl"),
        "training": TRAINING, "evaluation": evaluation(), "pod": SMALL_POD, **spec,
    })


def quantize(name: str, kind: str, source: str, precision: str, **spec: object) -> Object:
    """An ONNX conversion."""
    return obj("QuantizedModel", name, {
        "source": {"ref": {"kind": kind, "name": source}}, "precision": precision, "pod": SMALL_POD, **spec,
    })


def deployment(name: str, model: str, **spec: object) -> Object:
    """A ModelDeployment of a QuantizedModel."""
    return obj("ModelDeployment", name, {
        "model": {"ref": {"kind": "QuantizedModel", "name": model}},
        "pod": {"resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}}}, **spec,
    })


def describe(kube: Kubectl) -> str:
    """The chain as a user sees it, for messages of failed assertions."""
    return kube.run("get", "slm,pods", "-o", "wide") + json.dumps(
        {o["metadata"]["name"]: o.get("status", {}).get("conditions") for k in KINDS for o in kube.list(k)}, indent=1)


KINDS = ("distillationjobs", "finetunejobs", "quantizedmodels", "modeldeployments")
