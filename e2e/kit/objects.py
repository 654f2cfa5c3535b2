"""The objects that the scenarios apply: small specs of our four kinds over the seeded tiny artifacts."""

import json

from kit import chart
from kit.kubectl import Kubectl, Object

REGISTRY = f"{chart.RELEASE}-registry.{chart.NAMESPACE}.svc:5000"
STORE = f"oci://{REGISTRY}/e2e"
LATE = "late.e2e-bad-input.svc:5000"  # a registry that is not there at first
HUB = "http://hub.e2e-stores.svc:8000"  # a mirror of the Hub that test_stores.py brings
KINDS = ("distillationjobs", "finetunejobs", "quantizedmodels", "modeldeployments")

# A rate at which other seeds and other CPUs learn the task too; at 1e-2 it is luck.
TRAINING = {"maxSteps": 800, "learningRate": 2e-3, "batchSize": 16, "maxLength": 64, "warmupRatio": 0.1}
# A limit alone would be asked for as well, by each of the pods at work.
SMALL_POD = {
    "resources": {"requests": {"memory": "512Mi"}, "limits": {"memory": "3Gi"}},
    "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
}


def obj(kind: str, name: str, spec: Object) -> Object:
    """One of our objects; None leaves a field out."""
    given = {field: value for field, value in spec.items() if value is not None}
    return {"apiVersion": "slmops.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": given}


def dataset(file: str) -> Object:
    """One of the seeded files."""
    return {"uri": f"{STORE}/data:tiny", "file": file}


def evaluation(**extra: object) -> Object:
    """Evaluation on the seeded held-out set."""
    return {"dataset": dataset("heldout.jsonl"), "metrics": ["exactMatch", "jsonValid"], "maxTokens": 40, **extra}


def finetune(name: str = "teacher", **spec: object) -> Object:
    """A full fine-tune of the tiny base, about half a minute."""
    return obj(
        "FineTuneJob",
        name,
        {
            "base": {"uri": f"{STORE}/base:tiny"},
            "method": "full",
            "dataset": dataset("train.jsonl"),
            "training": TRAINING,
            "evaluation": evaluation(),
            "pod": SMALL_POD,
            **spec,
        },
    )


def quantize(name: str, kind: str, source: str, precision: str, **spec: object) -> Object:
    """An ONNX conversion."""
    return obj(
        "QuantizedModel",
        name,
        {
            "source": {"ref": {"kind": kind, "name": source}},
            "precision": precision,
            "pod": SMALL_POD,
            **spec,
        },
    )


def deployment(name: str, model: str, **spec: object) -> Object:
    """A ModelDeployment of a QuantizedModel."""
    return obj(
        "ModelDeployment",
        name,
        {
            "model": {"ref": {"kind": "QuantizedModel", "name": model}},
            "pod": {"resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}}},
            **spec,
        },
    )


def describe(kube: Kubectl) -> str:
    """The chain as a user sees it, for messages of failed assertions."""
    return kube.run("get", "slm,pods", "-o", "wide") + json.dumps(
        {o["metadata"]["name"]: o.get("status", {}).get("conditions") for k in KINDS for o in kube.list(k)}, indent=1
    )
