"""Models and data from a mirror of the Hub and from claims, results onto claims: no step touches the registry."""

import json
import urllib.request

from kit import pods
from kit.kubectl import ROOT, Kubectl, wait_for
from kit.objects import REGISTRY, SMALL_POD, TRAINING, finetune, obj

NAMESPACE = "e2e-stores"  # the chart is told of the mirror in it
FILES = (ROOT / "e2e/scenarios/serve_hub.py", ROOT / "tests/artifacts/hub.py")
BRIEF = {"training": {**TRAINING, "maxSteps": 5}, "evaluation": None}
BASE = "hf://tiny/base@main"


def hub(kube: Kubectl, image: str, store: str) -> None:
    """The mirror, ready."""
    files = {"configMap": {"name": "hub"}}
    made = pods.spec(
        image,
        ["python", "/files/serve_hub.py", store],
        env={"SLMOPS_PLAIN_HTTP": REGISTRY},
        mounts={"/files": files},
    )
    kube.apply(pods.config_map("hub", {file.name: file.read_text(encoding="utf-8") for file in FILES}))
    kube.apply(*pods.served("hub", made, 8000))
    kube.run("rollout", "status", "deployment/hub", "--timeout=90s", timeout=100)


def claim(name: str) -> dict[str, object]:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def secret(name: str, token: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"token": token}}


def answered(space: Kubectl, name: str) -> int:
    """Tokens of an answer that a ModelDeployment gives."""
    body = {"model": name, "messages": [{"role": "user", "content": "red box"}], "max_tokens": 5}
    with space.port_forward(f"service/{name}", 8000) as url:
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(json.loads(answer.read())["usage"]["completion_tokens"])


def test_stores(space: Kubectl, seeded: str, images: dict[str, str]) -> None:
    assert space.namespace == NAMESPACE
    hub(space, images["trainer"], seeded)
    from_hub = {"base": {"uri": BASE, "secretRef": {"name": "hub"}}}
    space.apply(
        claim("models"),
        secret("hub", "hf_wrong"),
        finetune(
            "first",
            **from_hub,
            dataset={"uri": "hf://datasets/tiny/data@main", "file": "train.jsonl"},
            output="pvc://models/first",
            **BRIEF,
        ),
        finetune(
            "second",
            base={"uri": "pvc://models/first"},
            dataset={"uri": "hf://datasets/tiny/data@main", "file": "heldout.jsonl"},
            output="pvc://models/second",
            suspend=True,  # a uri is not waited for, as a ref is
            **BRIEF,
        ),
    )

    def refused() -> bool:
        ready = space.condition("finetunejob", "first", "Ready") or {}
        said = ready.get("message", "")
        return ready.get("reason") == "SourceNotFound" and "HF_TOKEN" in said and "The Secret is hub." in said

    wait_for("the condition says that the token may be wrong, and where it is", refused, 180)
    space.apply(secret("hub", "hf_good"))
    first = space.wait_ready("finetunejob", "first", 240)
    assert first["status"]["artifact"]["uri"].startswith("pvc://models/first"), first["status"]["artifact"]
    parents = {parent["uri"].partition("@")[0] for parent in first["status"]["lineage"]["parents"]}
    assert parents == {"hf://tiny/base", "hf://datasets/tiny/data"}, parents

    space.patch("finetunejob", "second", {"spec": {"suspend": False}})
    second = space.wait_ready("finetunejob", "second", 180)
    digests = {parent["digest"] for parent in second["status"]["lineage"]["parents"]}
    assert first["status"]["artifact"]["digest"] in digests, "the lineage goes on through the claim"
    assert first["status"]["lineage"]["parents"][0]["digest"] in digests

    onnx = {
        "source": {"uri": "pvc://models/second"},
        "precision": "int4",
        "output": "pvc://models/onnx",
        "pod": SMALL_POD,
    }
    space.apply(obj("QuantizedModel", "onnx", onnx))
    space.wait_ready("quantizedmodel", "onnx", 180)
    space.apply(obj("ModelDeployment", "shop", {"model": {"uri": "pvc://models/onnx"}}))
    space.wait_ready("modeldeployment", "shop", 180)
    assert answered(space, "shop") > 0

    mounts = {"/claim": {"persistentVolumeClaim": {"claimName": "models"}}}
    command = ["python", "-m", "slmops_trainer.export_gguf", "/claim/second", "/claim/gguf", "--type", "f16"]
    space.apply(pods.pod("converter", pods.spec(images["trainer"], command, mounts=mounts)))
    pods.finish(space, "converter", 120)
    space.apply(obj("ModelDeployment", "gguf", {"model": {"uri": "pvc://models/gguf"}}))
    gguf = space.wait_ready("modeldeployment", "gguf", 180)
    assert answered(space, "gguf") > 0
    assert '"name":"llamacpp"' in space.run("logs", "-l", gguf["status"]["selector"], "--tail=-1")
    space.apply(obj("ModelDeployment", "gguf", {"model": {"uri": "pvc://models/gguf"}, "engine": {"name": "genai"}}))

    def told() -> bool:
        return "--engine llamacpp" in (space.condition("modeldeployment", "gguf", "Ready") or {}).get("message", "")

    wait_for("an engine that cannot read the model says which one can", told, 120)
    assert answered(space, "gguf") > 0
