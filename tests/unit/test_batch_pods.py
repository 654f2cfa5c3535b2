"""Pods that end, or do not end, by no fault of the run: nodes, disks, and what webhooks put beside the worker."""

from typing import Any

import pytest
from tests.unit.objects import RUNNING, Object, at, exited, finetune, job, pod, succeeded, waiting
from tests.unit.test_batch_life import COMPLETE_JOB, FAILED_JOB, after, kstatus, ready, run
from tests.unit.test_batch_trouble import message


def evicted(obj: Object, said: str, code: int = 137, **status: Any) -> Object:
    return pod(obj, phase="Failed", state=exited(code), reason="Evicted", message=said, **status)


OWN_DISK = (
    'Container worker exceeded its local ephemeral storage limit "2Gi". ',
    "Pod ephemeral local storage usage exceeds the total limit of containers 2Gi. ",
)


@pytest.mark.parametrize("text", OWN_DISK)
@pytest.mark.parametrize("code", [137, 143])  # killed, or ended by itself within the second that it has
def test_a_pod_that_wrote_more_than_its_limit_is_told_which(text: str, code: int) -> None:
    """The next one would do the same on any node: that it was taken off its node is no help."""
    obj = finetune()
    over = evicted(obj, text, code)
    plan = run(obj, job=job(obj), pods=(over,))
    assert (ready(plan)[1], plan.status["lastFailure"]["reason"]) == ("Retrying", "DiskFull")
    assert text.strip() in message(plan)
    assert "spec.pod.resources.limits.ephemeral-storage" in message(plan)
    assert [event.reason for event in plan.events] == ["AttemptFailed"]
    again = run(obj, job=job(obj, **FAILED_JOB), pods=(over,))
    assert (ready(again)[1], again.status["nextRetryTime"]) == ("DiskFull", at(30))
    node = evicted(obj, "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 9Mi. ")
    assert run(obj, job=job(obj), pods=(node,)).status["lastFailure"]["reason"] == "Evicted"


UNKNOWN = exited(137, reason="ContainerStatusUnknown", message="The container could not be located")
NODES: dict[str, tuple[str, Object]] = {
    "a broken device": ("NodeRefused", {"reason": "UnexpectedAdmissionError", "message": "no healthy devices"}),
    "a device that is taken": ("NodeRefused", {"reason": "OutOfnvidia.com/gpu", "message": "requested: 1, used: 1"}),
    "a label that is gone": ("NodeRefused", {"reason": "NodeAffinity", "message": "Predicate NodeAffinity failed"}),
    "a node that was started anew": ("NodeFailed", {"state": UNKNOWN}),
    "a node that was started anew within minutes": ("NodeFailed", {"state": exited(255, reason="Unknown")}),
    "a full node of an older kubelet": ("Evicted", {"state": exited(137), "reason": "Evicted", "message": "low"}),
}


@pytest.mark.parametrize("name", NODES)
def test_attempts_that_a_node_used_up_do_not_end_the_run(name: str) -> None:
    """A broken GPU refuses four pods within a minute."""
    reason, said = NODES[name]
    obj = finetune()
    pods = [pod(obj, name=f"tune-{number}", phase="Failed", **said) for number in range(4)]
    for one in pods:
        one["spec"]["nodeName"] = "node-7"
    plan = run(obj, job=job(obj, **FAILED_JOB), pods=tuple(pods))
    assert (kstatus(plan), ready(plan)[1], plan.status["nextRetryTime"]) == ("InProgress", reason, at(30))
    assert all(word in message(plan) for word in ([] if reason == "Evicted" else ["node-7", "tune-3"]))
    found = said.get("message") or said["state"]["terminated"].get("message") or "started anew"
    assert found in message(plan)


def test_a_pod_whose_injected_first_container_failed_is_no_fault_of_its_node() -> None:
    obj = finetune()
    plan = run(obj, job=job(obj, **{**FAILED_JOB, "failed": 1}), pods=(pod(obj, phase="Failed"),))
    assert (kstatus(plan), ready(plan)[1]) == ("Failed", "InternalError")


def test_a_webhooks_container_before_ours_is_not_taken_for_it() -> None:
    obj = finetune()
    proxy = {"name": "istio-proxy", "image": "proxy:1", "resources": {"limits": {"memory": "1Gi"}}}
    killed = pod(obj, phase="Failed", state=exited(137, reason="OOMKilled"), limits={"memory": "512Mi"})
    stuck = pod(obj, phase="Pending", state=waiting("ErrImagePull", "not found"))
    for one, word in ((killed, "512Mi"), (stuck, "trainer:1")):
        one["spec"]["containers"].insert(0, proxy)
        assert word in message(run(obj, job=job(obj), pods=(one,)))


def beside(obj: Object, state: Object, proxy: Object = RUNNING, **status: Any) -> Object:
    """A pod whose worker is in this state, and a container that a webhook added in that one."""
    found = pod(obj, state=state, **status)
    found["status"]["containerStatuses"].insert(0, {"name": "istio-proxy", "state": proxy})
    return found


def since(seconds: float, state: Object) -> Object:
    """A container that ended so long ago."""
    return {"terminated": {**state["terminated"], "finishedAt": at(-seconds)}}


def test_a_sidecar_that_keeps_a_failed_pod_is_named_with_the_remedy() -> None:
    obj = finetune()
    early = run(obj, job=job(obj), pods=(beside(obj, since(50, exited(1))),))
    assert ready(early)[1] == "Retrying"
    assert early.requeue is not None  # no event will tell that it is late
    held = beside(obj, since(61, exited(1)))
    plan = run(obj, job=job(obj), pods=(held,))
    assert (ready(plan)[1], kstatus(plan)) == ("SidecarRuns", "InProgress")
    for words in ("istio-proxy", "slmops.dev/role=worker", "kubectl -n ns delete pod tune-abc"):
        assert words in message(plan)
    assert [event.reason for event in plan.events] == ["AttemptFailed", "SidecarRuns"]
    assert run(after(obj, plan), job=job(obj), pods=(held,)).events == ()
    for over in (beside(obj, since(61, exited(1)), exited(0)), beside(obj, since(61, exited(1)), phase="Failed")):
        assert ready(run(obj, job=job(obj), pods=(over,)))[1] == "Retrying"


@pytest.mark.parametrize("ttl", [None, 3600])
def test_a_sidecar_keeps_no_gpu_after_a_success(ttl: int | None) -> None:
    obj = finetune(ttlSecondsAfterFinished=ttl)
    done = run(obj, job=job(obj), pods=(beside(obj, since(5, succeeded())),))
    assert (done.status["phase"], done.delete, done.requeue) == ("Succeeded", (), 60.0)  # first it has to be written
    obj = after(obj, done)
    assert run(obj, job=job(obj)).requeue == 55.0
    obj["status"]["completionTime"] = at(-60)
    assert [key.name for key in run(obj, job=job(obj)).delete] == ["tune-finetune"]
    ended = run(obj, job=job(obj, **COMPLETE_JOB))
    assert (ended.delete, ended.requeue) == ((), ttl and ttl - 60.0)
