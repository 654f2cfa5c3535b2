"""What goes wrong in training pods: named, mended by itself where it can be, nothing paid for lost."""

import re
from typing import Any

from kit import chart
from kit.kubectl import Kubectl, Object, wait_for
from kit.objects import SMALL_POD, STORE, TRAINING, dataset, describe, finetune, obj


def status_of(kube: Kubectl, kind: str, name: str) -> dict[str, Any]:
    status: dict[str, Any] = (kube.get(kind, name) or {}).get("status") or {}
    return status


def stalled(kube: Kubectl, kind: str, name: str, timeout: float = 120) -> Object:
    """The Stalled condition once it is True."""

    def probe() -> Object | None:
        condition = kube.condition(kind, name, "Stalled")
        return condition if condition and condition["status"] == "True" else None

    return wait_for(f"{kind}/{name} Stalled", probe, timeout)


def resumed_at(kube: Kubectl, owner: str) -> int:
    """The step at which the pod that finished took over, as its log tells; 0 if it began anew."""

    def log() -> str:
        pods = [pod for pod in kube.list("pods", f"slmops.dev/owner={owner}") if pod["status"]["phase"] == "Succeeded"]
        return kube.run("logs", pods[-1]["metadata"]["name"]) if pods else ""

    found = re.search(r"Resumed at step (\d+) of", wait_for("a finished pod's log", log, 30))
    return int(found[1]) if found else 0


def test_out_of_memory_is_named(space: Kubectl, seeded: str) -> None:
    tight = {"resources": {"limits": {"memory": "160Mi"}}}
    space.apply(finetune("hungry", pod=tight, backoffLimit=0))
    condition = stalled(space, "finetunejob", "hungry")
    assert condition["reason"] == "OutOfMemory", condition
    assert "160Mi" in condition["message"], condition
    assert status_of(space, "finetunejob", "hungry")["lastFailure"]["reason"] == "OutOfMemory"


def test_pod_deleted_in_training_resumes(space: Kubectl, seeded: str) -> None:
    training = {**TRAINING, "maxSteps": 1500, "checkpoint": {"everySeconds": 5}}
    space.apply(finetune("patient", training=training, evaluation=None, backoffLimit=0))

    def step() -> int:
        progress = status_of(space, "finetunejob", "patient").get("progress") or {}
        return progress.get("step") or 0 if progress.get("stage") == "Training" else 0

    reached = wait_for("training is under way", lambda: (s := step()) > 300 and s, 240)
    pod = space.list("pods")[0]["metadata"]["name"]
    space.delete("pod", pod)
    done = space.wait_ready("finetunejob", "patient", 300)
    assert done["status"]["attempts"] == 0, done["status"]
    assert resumed_at(space, "patient") > reached / 2


def test_suspend_keeps_what_was_done(space: Kubectl, seeded: str) -> None:
    training = {**TRAINING, "maxSteps": 1500, "checkpoint": {"everySeconds": 5}}
    space.apply(finetune("pausing", training=training, evaluation=None))
    wait_for(
        "training is under way",
        lambda: (status_of(space, "finetunejob", "pausing").get("progress") or {}).get("stage") == "Training",
        240,
    )
    space.patch("finetunejob", "pausing", {"spec": {"suspend": True}})
    wait_for("no pod is left", lambda: not [p for p in space.list("pods") if p["status"]["phase"] == "Running"], 90)
    condition = wait_for("Suspended", lambda: space.condition("finetunejob", "pausing", "Suspended"), 30)
    assert condition["status"] == "True"
    space.patch("finetunejob", "pausing", {"spec": {"suspend": False}})
    space.wait_ready("finetunejob", "pausing", 300)
    assert resumed_at(space, "pausing") > 0


TEACHER = """
import json, http.server
class Teacher(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = body["messages"][-1]["content"].replace(",", " ").split()
        colour = next((w for w in words if w in "red green blue black white yellow pink brown".split()), "")
        shape = next((w for w in words if w in "box ball cone ring plate stick".split()), "")
        text = json.dumps({"colour": colour, "shape": shape})
        Teacher.asked += 1
        self.reply({"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop",
                                 "message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}})
    def do_GET(self):
        self.reply({"asked": Teacher.asked})
    def reply(self, what):
        data = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 8000), Teacher).serve_forever()
"""


def teacher_objects(image: str) -> list[Object]:
    """A scripted teacher behind a Service; scaled to 0 it is down."""
    labels = {"app": "teacher"}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "teacher"}, "data": {"teacher.py": TEACHER}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "teacher"},
            "spec": {"selector": labels, "ports": [{"port": 8000}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "teacher"},
            "spec": {
                "replicas": 0,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "securityContext": {
                            "runAsNonRoot": True,
                            "runAsUser": 65532,
                            "seccompProfile": {"type": "RuntimeDefault"},
                        },
                        "containers": [
                            {
                                "name": "teacher",
                                "image": image,
                                "imagePullPolicy": "Never",
                                "command": ["python", "/files/teacher.py"],
                                "readinessProbe": {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1},
                                "securityContext": {
                                    "allowPrivilegeEscalation": False,
                                    "capabilities": {"drop": ["ALL"]},
                                },
                                "volumeMounts": [{"name": "files", "mountPath": "/files"}],
                            }
                        ],
                        "volumes": [{"name": "files", "configMap": {"name": "teacher"}}],
                    },
                },
            },
        },
    ]


def test_teacher_down_then_back(space: Kubectl, seeded: str, images: dict[str, str]) -> None:
    space.apply(*teacher_objects(images["operator"]))
    space.apply(
        obj(
            "DistillationJob",
            "student",
            {
                "teacher": {"endpoint": {"url": f"http://teacher.{space.namespace}.svc:8000/v1", "model": "any"}},
                "student": {"uri": f"{STORE}/base:tiny"},
                "data": {"prompts": {**dataset("prompts.jsonl"), "limit": 100}},
                "training": {**TRAINING, "maxSteps": 20},
                "pod": SMALL_POD,
            },
        )
    )

    def says_so() -> bool:
        status = status_of(space, "distillationjob", "student")
        words = str(status.get("progress")) + str(status.get("conditions")) + str(status.get("lastFailure"))
        return "teacher" in words.lower() and "unavailable" in words.lower()

    wait_for("status says that the teacher is unavailable", says_so, 120)
    assert (space.condition("distillationjob", "student", "Stalled") or {}).get("status") != "True", describe(space)
    space.run("scale", "deployment/teacher", "--replicas=1")
    done = space.wait_ready("distillationjob", "student", 240)
    assert done["status"]["metrics"]["answers"] == 100, done["status"]["metrics"]


def test_quota_forbids_the_pod_then_grows(space: Kubectl, seeded: str) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": {"limits.memory": "1Gi"}},
    }
    space.apply(quota)
    space.apply(finetune("squeezed", training={**TRAINING, "maxSteps": 5}, evaluation=None))

    def forbidden() -> bool:
        ready = space.condition("finetunejob", "squeezed", "Ready") or {}
        return ready.get("reason") == "QuotaExceeded" and "quota" in ready.get("message", "")

    wait_for("the condition names the quota", forbidden, 60)
    space.delete("resourcequota", "small")
    space.wait_ready("finetunejob", "squeezed", 240)


def test_missing_secret_mends_itself(space: Kubectl, seeded: str) -> None:
    space.apply(
        finetune(
            "locked",
            base={"uri": f"{STORE}/base:tiny", "secretRef": {"name": "later"}},
            training={**TRAINING, "maxSteps": 5},
            evaluation=None,
        )
    )

    def said() -> bool:
        ready = space.condition("finetunejob", "locked", "Ready") or {}
        return ready.get("reason") == "SecretNotFound" and "later" in ready.get("message", "")

    wait_for("the condition names the Secret", said, 30)
    assert not space.list("pods"), "no pod may run before its Secret is there"
    space.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "later"},
            "type": "kubernetes.io/dockerconfigjson",
            "stringData": {".dockerconfigjson": '{"auths": {}}'},
        }
    )
    space.wait_ready("finetunejob", "locked", 180)


def test_a_gpu_job_lands_on_the_node_that_has_one(space: Kubectl, seeded: str) -> None:
    node = space.list("nodes")[0]["metadata"]["name"]
    gpu = "nvidia.com/gpu"
    pod = {
        "resources": {"limits": {"memory": "3Gi", gpu: 1}},
        "tolerations": [{"key": gpu, "operator": "Exists"}],
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
    }
    space.apply(finetune("accelerated", pod=pod, training={**TRAINING, "maxSteps": 5}, evaluation=None))

    def waits() -> bool:
        ready = space.condition("finetunejob", "accelerated", "Ready") or {}
        return ready.get("reason") == "Unschedulable" and gpu in ready.get("message", "")

    wait_for("the condition says that no node has a GPU", waits, 60)
    try:
        space.patch("node", node, {"status": {"capacity": {gpu: "1"}, "allocatable": {gpu: "1"}}}, subresource="status")
        space.wait_ready("finetunejob", "accelerated", 180)
        limits = [p["spec"]["containers"][0]["resources"]["limits"] for p in space.list("pods")]
        assert all(limit[gpu] == "1" for limit in limits), limits
    finally:
        space.patch(
            "node", node, {"status": {"capacity": {gpu: None}, "allocatable": {gpu: None}}}, subresource="status"
        )


def test_names_of_63_characters(space: Kubectl, seeded: str) -> None:
    name = "a" * 60 + "-63"
    assert chart.RELEASE not in name
    space.apply(finetune(name, training={**TRAINING, "maxSteps": 5}, evaluation=None))
    space.wait_ready("finetunejob", name, 180)
