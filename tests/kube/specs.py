"""Specs that use every field, several to a kind where fields exclude each other, and what every CEL rule rejects."""

from typing import Any

Object = dict[str, Any]

URI = {"uri": "hf://org/model@main", "secretRef": {"name": "hub"}}
REF = {"ref": {"kind": "FineTuneJob", "name": "base"}}
DATA = {
    "uri": "oci://r/data:1",
    "file": "train.jsonl",
    "secretRef": {"name": "pull"},
    "format": "messages",
    "columns": {"messages": "m", "prompt": "p", "completion": "c"},
    "limit": 10,
}
MAP = {"configMap": {"name": "data", "key": "train"}}
POD = {
    "image": "trainer:1",
    "resources": {"requests": {"cpu": "500m", "memory": 1000000}, "limits": {"cpu": 2, "nvidia.com/gpu": 1}},
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [
        {"key": "gpu", "operator": "Equal", "value": "x", "effect": "NoExecute", "tolerationSeconds": 5},
    ],
    "priorityClassName": "batch",
    "runtimeClassName": "nvidia",
    "env": [{"name": "A", "value": "b"}, {"name": "EMPTY"}],
    "imagePullSecrets": [{"name": "pull"}],
}
EVALUATION = {
    "dataset": DATA,
    "metrics": ["exactMatch", "tokenF1"],
    "thresholds": {"exactMatch": 0.5},
    "maxTokens": 16,
    "batchSize": 4,
}
POLICY = {
    "suspend": True,
    "backoffLimit": 2,
    "activeDeadlineSeconds": 600,
    "ttlSecondsAfterFinished": 60,
    "queueName": "gpus",
    "pod": POD,
    "output": "oci://r/out:1",
    "evaluation": EVALUATION,
}
TRAINING = {
    "epochs": 1.5,
    "learningRate": 0.001,
    "batchSize": 8,
    "gradientAccumulation": 2,
    "maxLength": 128,
    "precision": "bf16",
    "gradientCheckpointing": True,
    "scheduler": "linear",
    "warmupRatio": 0.1,
    "weightDecay": 0.01,
    "maxGradNorm": 1.0,
    "seed": 7,
    "earlyStopping": {"patience": 3, "everySteps": 10, "minDelta": 0.1},
    "checkpoint": {"everySeconds": 60},
}
LORA = {"r": 8, "alpha": 16, "dropout": 0.1, "targetModules": ["q_proj"]}
GENERATION = {
    "samplesPerPrompt": 2,
    "temperature": 0.5,
    "topP": 0.9,
    "maxTokens": 64,
    "systemPrompt": "Answer.",
    "chainOfThought": True,
    "concurrency": 4,
    "requestTimeoutSeconds": 30,
    "minSuccessRatio": 0.5,
    "maxTotalTokens": 1000,
}
FILTERS = {
    "dedupe": False,
    "minCharacters": 2,
    "maxCharacters": 100,
    "dropTruncated": False,
    "validJson": True,
    "jsonSchema": {"name": "schema", "key": "s"},
    "decontaminate": False,
}
ANALYSIS = {
    "intervalSeconds": 5,
    "windowSeconds": 30,
    "minSamples": 10,
    "passes": 3,
    "failureLimit": 0,
    "metrics": [
        {"name": "errors", "builtin": "errorRate", "max": 0.01},
        {"name": "own", "query": "up", "min": 1.0, "max": 2.0},
    ],
}

EXAMPLES: dict[str, list[Object]] = {
    "DistillationJob": [
        {
            **POLICY,
            "teacher": {
                "endpoint": {
                    "url": "https://t:1/a@b/v1?c=d@e",
                    "model": "big",
                    "apiKeySecretRef": {"name": "k", "key": "token"},
                }
            },
            "student": URI,
            "taskType": "extraction",
            "data": {"prompts": DATA, "generation": GENERATION, "filters": FILTERS},
            "training": TRAINING,
        },
        {
            "teacher": {"deploymentRef": {"name": "teacher"}},
            "student": REF,
            "data": {"prompts": MAP},
            "evaluation": {"dataset": MAP},
            "training": {"maxSteps": 5},
        },
    ],
    "FineTuneJob": [
        {
            **POLICY,
            "base": URI,
            "method": "lora",
            "lora": LORA,
            "merge": False,
            "dataset": DATA,
            "lossOn": "all",
            "training": TRAINING,
        },
        {
            "base": REF,
            "method": "full",
            "dataset": MAP,
            "evaluation": {"dataset": MAP},
            "training": {"maxSteps": 5},
        },
    ],
    "QuantizedModel": [
        {
            **{name: value for name, value in POLICY.items() if name != "evaluation"},
            "source": URI,
            "precision": "int4",
            "blockSize": 64,
            "symmetric": False,
            "accuracyLevel": 4,
            "gate": {"dataset": DATA, "metric": "tokenF1", "maxDrop": 0.05, "maxTokens": 32},
        },
        {"source": REF, "precision": "fp32", "gate": {"dataset": MAP}},
    ],
    "ModelDeployment": [
        {
            "model": URI,
            "servedName": "mine",
            "engine": {"name": "onnxruntime", "image": "server:1", "args": ["--slots=4", "--threads", "2"]},
            "replicas": 2,
            "endpoint": {"apiKeysSecretRef": {"name": "keys"}},
            "pod": {name: value for name, value in POD.items() if name != "image"},
            "rollout": {
                "steps": [{"weight": 10, "pauseSeconds": 5}, {"weight": 50, "approval": True}],
                "analysis": ANALYSIS,
                "progressDeadlineSeconds": 60,
                "scaleDownDelaySeconds": 0,
            },
        },
        {"model": {"ref": {"kind": "QuantizedModel", "name": "q"}}},
        {
            "model": URI,
            "pod": {"image": "server:1", "resources": {"limits": {"cpu": 2, "nvidia.com/gpu": "1"}}},
            "rollout": {
                "steps": [
                    {"weight": 0, "pauseSeconds": 1},
                    {"weight": 5, "approval": True},
                    {"weight": 5, "pauseSeconds": 1},
                    {"weight": 100, "pauseSeconds": 604800},
                ]
            },
        },
        {
            "model": URI,
            "rollout": {
                "steps": [{"weight": 1}, {"weight": 100}],
                "analysis": {"metrics": [{"name": "exact", "query": "up", "min": 1.0, "max": 1.0}]},
            },
        },
        {"model": URI, "rollout": {"steps": []}, "pod": {"resources": {"requests": {"cpu": 2}}}},
        {"model": URI, "pod": {"resources": {"limits": {"cpu": 2, "example.com/device": "1"}}}},
    ],
}


OUTPUTS = ("pvc://models/a", "pvc://models//a/b/", "oci://host:5000/a:v1", "oci://r/a/b", "oci://r/a")
# A whole claim, beside which there is no place for checkpoints; a registry alone, whose port would be taken for a tag.
NO_OUTPUTS = (
    "pvc://models", "pvc://models/", "pvc://models//", "pvc:///models", "pvc://", "oci://host:5000", "oci://host/",
    "oci:///host", "oci://r/a@sha256:aa", "oci://user@r/a", "hf://org/model", "/models/a", "oci://r/a b",
)  # fmt: skip


def put(spec: Object, path: str, value: Any) -> Object:
    """A copy of `spec` with the field at `path` (dots; numbers index lists) set, or taken away where value is None."""
    head, _, rest = path.partition(".")
    if isinstance(spec, list):
        items = list(spec)
        items[int(head)] = put(items[int(head)], rest, value) if rest else value
        return items
    copy = dict(spec)
    if rest:
        copy[head] = put(copy.get(head, {}), rest, value)
    elif value is None:
        copy.pop(head, None)
    else:
        copy[head] = value
    return copy


QUANTIZED = {"ref": {"kind": "QuantizedModel", "name": "q"}}  # what a ModelDeployment can name
BOTH = {**URI, **REF}
ONE_OF_URI_AND_REF = "give exactly one of uri and ref"
ONE_OF_URI_AND_MAP = "give exactly one of uri and configMap"
REF_WITHOUT_SECRET = "secretRef goes with uri; a ref needs no credentials"

Change = dict[str, Any]

# (kind, message of the rule) -> changes of the kind's first example (or the second, where "example": 1), by path.
REJECTED: dict[tuple[str, str], list[Change]] = {}


def rejects(kind: str, message: str, *changes: Change) -> None:
    REJECTED.setdefault((kind, message), []).extend(changes)


for kind, model in (
    ("DistillationJob", "student"), ("FineTuneJob", "base"), ("QuantizedModel", "source"),
):  # fmt: skip
    rejects(kind, ONE_OF_URI_AND_REF, {model: BOTH}, {model: {}})
    rejects(kind, REF_WITHOUT_SECRET, {model: {**REF, "secretRef": {"name": "s"}}})

for kind, place in (
    ("DistillationJob", "data.prompts"), ("DistillationJob", "evaluation.dataset"),
    ("FineTuneJob", "dataset"), ("FineTuneJob", "evaluation.dataset"), ("QuantizedModel", "gate.dataset"),
):  # fmt: skip
    rejects(kind, ONE_OF_URI_AND_MAP, {place: {**MAP, "uri": "oci://r/d:1"}}, {place: {"format": "auto"}})
    rejects(kind, "file goes with uri; a configMap names its key", {place: {**MAP, "file": "a.jsonl"}})
    rejects(kind, "secretRef goes with uri", {place: {**MAP, "secretRef": {"name": "s"}}})

for kind in ("DistillationJob", "FineTuneJob"):
    rejects(kind, "give epochs or maxSteps, not both", {"training.maxSteps": 5})
    rejects(kind, "training.earlyStopping needs evaluation", {"evaluation": None})
    rejects(kind, "thresholds: each name has to be one of metrics", {"evaluation.thresholds": {"exactMtach": 0.5}})

for kind in EXAMPLES:
    rejects(
        kind,
        "names starting with SLMOPS_ are the operator's own",
        {"pod.env": [{"name": "SLMOPS_RUN", "value": "x"}]},
    )

rejects(
    "DistillationJob",
    "give exactly one of endpoint and deploymentRef",
    {"teacher.deploymentRef": {"name": "t"}},
    {"teacher": {}},
)
rejects(
    "DistillationJob",
    "url names a user or a key: put the key into a Secret and name that in apiKeySecretRef",
    {"teacher.endpoint.url": "https://user:key@t/v1"},
    {"teacher.endpoint.url": "http://key@t?v=1"},
)
rejects("FineTuneJob", "lora goes with method: lora", {"method": "full", "merge": None})
rejects("FineTuneJob", "merge goes with method: lora", {"method": "full", "lora": None})
for field in ("blockSize", "symmetric", "accuracyLevel"):
    only = {name: None for name in ("blockSize", "symmetric", "accuracyLevel") if name != field}
    rejects("QuantizedModel", f"{field} goes with precision: int4", {"precision": "fp16", **only})
rejects("ModelDeployment", ONE_OF_URI_AND_REF, {"model": {**URI, **QUANTIZED}}, {"model": {}})
rejects("ModelDeployment", REF_WITHOUT_SECRET, {"model": {**QUANTIZED, "secretRef": {"name": "s"}}})
rejects("ModelDeployment", "give exactly one of builtin and query", {"rollout.analysis.metrics.0.query": "up"})
rejects("ModelDeployment", "give max or min, or both", {"rollout.analysis.metrics.0.max": None})
rejects(
    "ModelDeployment",
    "min is above max: no value can pass",
    {"rollout.analysis.metrics.1.min": 2.5},
)
rejects(
    "ModelDeployment",
    "steps: a weight must not be below that of the step before",
    {"rollout.steps.0.weight": 51},
)
rejects(
    "ModelDeployment",
    "steps: each needs pauseSeconds, approval, or analysis with a weight above 0; else it proves nothing",
    {"rollout.steps": [{"weight": 10}], "rollout.analysis": None},
    {"rollout.steps": [{"weight": 10, "approval": False}], "rollout.analysis": None},
    {"rollout.steps": [{"weight": 0}, {"weight": 10}]},
)
rejects("ModelDeployment", "give engine.image or pod.image, not both", {"pod.image": "server:2"})
GPU_WITHOUT_SERVER = "a GPU needs engine.image, a server that uses it: the operator's own computes on the CPU alone"
rejects(
    "ModelDeployment",
    GPU_WITHOUT_SERVER,
    {"engine.image": None},
    {"engine": None, "pod.resources.limits": {"nvidia.com/gpu": "2"}},
)
rejects(
    "ModelDeployment",
    "args: model, served-name, host, port, metrics-port and api-keys-dir are set by the operator, engine by name",
    {"engine.args": ["--model", "/other"]},
    {"engine.args": ["--slots=4", "--port=9000"]},
    {"engine.args": ["--engine", "genai"]},
)
