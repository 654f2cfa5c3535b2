"""What goes wrong in training pods: named, mended by itself where it can be, nothing paid for lost."""

import re
from typing import Any

from kit.kubectl import Kubectl, Object, wait_for
from kit.objects import SMALL_POD, STORE, TRAINING, dataset, describe, finetune, obj
from kit.teacher import Teacher


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
    training = {**TRAINING, "maxSteps": 2500, "checkpoint": {"everySeconds": 5}}
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
    training = {**TRAINING, "maxSteps": 2500, "checkpoint": {"everySeconds": 5}}
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


def test_teacher_down_in_mid_generation_then_back(space: Kubectl, seeded: str, images: dict[str, str]) -> None:
    teacher = Teacher(space, images["operator"], "down-after", "40")
    space.apply(
        obj(
            "DistillationJob",
            "student",
            {
                "teacher": {"endpoint": teacher.endpoint},
                "student": {"uri": f"{STORE}/base:tiny"},
                "data": {"prompts": {**dataset("prompts.jsonl"), "limit": 100}},
                "training": {**TRAINING, "maxSteps": 20},
                "pod": SMALL_POD,
                "backoffLimit": 0,
            },
        )
    )
    teacher.answered(40, 120)

    def says_so() -> bool:
        progress = status_of(space, "distillationjob", "student").get("progress") or {}
        return "Teacher unavailable" in progress.get("message", "")

    wait_for("status says that the teacher is unavailable", says_so, 60)
    assert (space.condition("distillationjob", "student", "Stalled") or {}).get("status") != "True", describe(space)
    first = space.list("pods", "slmops.dev/owner=student")[0]["metadata"]["name"]
    space.delete("pod", first)  # its answers were paid for: the next pod must know them
    wait_for("another pod", lambda: [p for p in worker_pods(space, "student") if p != first], 60)
    teacher.revive()
    done = space.wait_ready("distillationjob", "student", 240)
    assert done["status"]["metrics"]["answers"] == 100, done["status"]["metrics"]
    assert done["status"]["attempts"] == 0, done["status"]
    asked = teacher.asked()
    assert len(asked) == 100
    assert max(asked.values()) == 1, f"asked twice: {[q for q, times in asked.items() if times > 1]}"


def worker_pods(kube: Kubectl, owner: str) -> list[str]:
    """Names."""
    return [pod["metadata"]["name"] for pod in kube.list("pods", f"slmops.dev/owner={owner}")]


def test_a_gpu_job_lands_on_the_node_that_has_one_and_ends_where_it_sees_none(
    space: Kubectl, seeded: str, gpu_node: str
) -> None:
    gpu, runtime = "nvidia.com/gpu", "e2e-nvidia"
    pod = {
        "runtimeClassName": runtime,
        "resources": {"limits": {"memory": "3Gi", gpu: 1}},
        "tolerations": [{"key": gpu, "operator": "Exists"}],
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
    }
    # As the GPU operator's, but for the handler: the node has runc alone.
    runtime_class = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "runc"}
    try:
        space.apply({**runtime_class, "metadata": {"name": runtime}})
        space.apply(finetune("accelerated", pod=pod, training={**TRAINING, "maxSteps": 5}, evaluation=None))

        def waits() -> bool:
            ready = space.condition("finetunejob", "accelerated", "Ready") or {}
            return ready.get("reason") == "Unschedulable" and gpu in ready.get("message", "")

        wait_for("the condition says that no node has a GPU", waits, 60)
        space.patch(
            "node", gpu_node, {"status": {"capacity": {gpu: "1"}, "allocatable": {gpu: "1"}}}, subresource="status"
        )
        # The node only says that it has one, and the default image has no CUDA: the run ends at once with the remedy.
        condition = stalled(space, "finetunejob", "accelerated", 180)
        assert condition["reason"] == "BadSpec", condition
        assert "spec.pod.image" in condition["message"], condition
        (landed,) = space.list("pods")
        assert landed["spec"]["nodeName"] == gpu_node
        assert landed["spec"]["runtimeClassName"] == runtime
        assert landed["spec"]["containers"][0]["resources"]["limits"][gpu] == "1"
    finally:
        space.patch(
            "node", gpu_node, {"status": {"capacity": {gpu: None}, "allocatable": {gpu: None}}}, subresource="status"
        )
        space.delete("runtimeclass", runtime)
