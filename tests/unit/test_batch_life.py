"""decide() of a batch object, for every state of its Job and pods that users have met."""

from typing import Any

import pytest
from tests.unit.objects import (
    ARTIFACT,
    NOW,
    RUNNING,
    Object,
    at,
    condition,
    exited,
    finetune,
    job,
    of,
    ours,
    pod,
    said,
    succeeded,
    waiting,
)

from slmops.api.meta import Progress
from slmops.reconcile.batch_life import decide
from slmops.reconcile.batch_pass import Blocked, Pass, Seen
from slmops.reconcile.state import Plan
from slmops.reconcile.table import RECIPES

WANTED = {"kind": "Job", "metadata": {"name": "tune-finetune", "namespace": "ns"}}


def run(obj: Object, **seen: Any) -> Plan:
    recipe = next(recipe for recipe in RECIPES if recipe.kind == obj["kind"])
    spec = recipe.spec.model_validate(obj["spec"])
    return decide(Pass(obj, spec, recipe.status.model_validate(obj["status"]), Seen(**seen), NOW))


def after(obj: Object, plan: Plan) -> Object:
    """The object as the next pass finds it."""
    return {**obj, "status": plan.status}


def ready(plan: Plan) -> tuple[str, str]:
    found = next(c for c in plan.status["conditions"] if c["type"] == "Ready")
    return found["status"], found["reason"]


def kstatus(plan: Plan) -> str:
    """What kstatus computes of these conditions."""
    said = {c["type"]: c["status"] for c in plan.status["conditions"]}
    assert "Ready" in said
    assert not ("Reconciling" in said and "Stalled" in said)
    if said.get("Reconciling") == "True":
        return "InProgress"
    if said.get("Stalled") == "True":
        return "Failed"
    return "Current" if said["Ready"] == "True" else "InProgress"


COMPLETE_JOB: dict[str, Any] = {"conditions": [condition("Complete")]}
FAILED_JOB: dict[str, Any] = {
    "conditions": [condition("Failed", "BackoffLimitExceeded", "Job has reached the limit")],
    "failed": 4,
}
FATAL_JOB: dict[str, Any] = {
    "conditions": [condition("Failed", "PodFailurePolicy", "Container worker failed")],
    "failed": 1,
}


def told(reason: str, message: str = "", about: str = "pod-tune-abc") -> Object:
    """An Event."""
    return {"reason": reason, "message": message, "involvedObject": {"uid": about}}


def long_ago(state: Object) -> Object:
    """A container that ended an hour ago."""
    return {"terminated": {**state["terminated"], "finishedAt": at(-3600)}}


def deleting(obj: Object) -> Object:
    return {**obj, "metadata": {**obj["metadata"], "deletionTimestamp": at(-1)}}


# name -> (phase, Ready's reason, kstatus, what is seen of a FineTuneJob)
STATES: dict[str, tuple[str, str, str, Any]] = {
    "source not ready: waits, and nobody polls": (
        "Waiting", "SourceNotReady", "InProgress",
        lambda o: {"blocked": Blocked("SourceNotReady", "Waits for FineTuneJob/a.", None)},
    ),
    "nothing there yet: the Job is made": ("Pending", "Starting", "InProgress", lambda o: {"wanted": WANTED}),
    "a pod of a former Job still saves its checkpoint": (
        "Waiting", "PodTerminating", "InProgress", lambda o: {"wanted": WANTED, "former": (deleting(pod(o)),)},
    ),
    "Job without a pod": ("Pending", "Starting", "InProgress", lambda o: {"job": job(o)}),
    "pod waits for a node": (
        "Pending", "Unschedulable", "InProgress",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Pending", conditions=[
            condition("PodScheduled", "Unschedulable", "0/1 nodes: Insufficient nvidia.com/gpu", "False")]),)},
    ),
    "image cannot be pulled": (
        "Pending", "ImagePullBackOff", "InProgress",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Pending", state=waiting("ErrImagePull", "not found")),)},
    ),
    "container cannot be made: a key is missing": (
        "Pending", "CreateContainerConfigError", "InProgress",
        lambda o: {"job": job(o), "pods": (
            pod(o, phase="Pending", state=waiting("CreateContainerConfigError", "couldn't find key")),)},
    ),
    "pod is long in being made, and an Event tells why": (
        "Pending", "FailedMount", "InProgress",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Pending", state=waiting("ContainerCreating")),), "events": (
            told("Scheduled"), told("FailedMount", 'configmap "x" not found'), told("SandboxChanged"),
            told("Pulled", about="another"),
        )},
    ),
    "its image is pulled, and what an Event told before is over": (
        "Pending", "Starting", "InProgress",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Pending", state=waiting("ContainerCreating")),),
                   "events": (told("FailedScheduling"), told("Scheduled"), told("FailedMount"), told("Pulling"))},
    ),
    "pod is being deleted": (
        "Pending", "PodTerminating", "InProgress",
        lambda o: {"job": job(o), "pods": (deleting(pod(o, state=RUNNING)),)},
    ),
    "pod is being made": (
        "Pending", "Starting", "InProgress",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Pending", state=waiting("ContainerCreating")),)},
    ),
    "pod runs": ("Running", "Running", "InProgress", lambda o: {"job": job(o), "pods": (pod(o, state=RUNNING),)}),
    "pod ended well, the Job's controller has not noticed yet": (
        "Succeeded", "Succeeded", "Current",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Succeeded", state=succeeded()),)},
    ),
    "second attempt after a pod's own fault": (
        "Pending", "Retrying", "InProgress",
        lambda o: {"job": job(o, failed=1), "pods": (pod(o, phase="Failed", state=exited(1)),)},
    ),
    "pod stopped by SIGTERM: no failure": (
        "Pending", "Starting", "InProgress",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Failed", state=said("Interrupted", "saved", 143)),)},
    ),
    "all attempts failed": (
        "Failed", "InternalError", "Failed",
        lambda o: {"job": job(o, **FAILED_JOB), "pods": (pod(o, phase="Failed", state=exited(1)),)},
    ),
    "out of memory to the end": (
        "Failed", "OutOfMemory", "Failed",
        lambda o: {"job": job(o, **FAILED_JOB), "pods": (
            pod(o, phase="Failed", state=exited(137, reason="OOMKilled"), limits={"memory": "512Mi"}),)},
    ),
    "nothing to train: ends at once": (
        "Failed", "NothingToTrain", "Failed",
        lambda o: {"job": job(o, **FATAL_JOB), "pods": (
            pod(o, phase="Failed", state=said("NothingToTrain", "line 3: no answer", 3)),)},
    ),
    "bad dataset behind a tag: looks again later": (
        "Failed", "BadDataset", "Failed",
        lambda o: {"job": job(o, **FATAL_JOB), "pods": (
            pod(o, phase="Failed", state=said("BadDataset", "line 3: no column prompt", 3)),)},
    ),
    "quality below threshold": (
        "Failed", "QualityBelowThreshold", "Failed",
        lambda o: {"job": job(o, **FATAL_JOB), "pods": (
            pod(o, phase="Failed", state=said("QualityBelowThreshold", "0.4 < 0.9", 3)),)},
    ),
    "teacher unavailable to the end: tried again later": (
        "Waiting", "TeacherUnavailable", "InProgress",
        lambda o: {"job": job(o, **FAILED_JOB), "pods": (
            pod(o, phase="Failed", state=said("TeacherUnavailable", "connection refused", 1)),)},
    ),
    "access denied, said to be fatal: tried again later": (
        "Waiting", "AccessDenied", "InProgress",
        lambda o: {"job": job(o, **FATAL_JOB), "pods": (
            pod(o, phase="Failed", state=said("AccessDenied", "401", 3)),)},
    ),
    "deadline": (
        "Failed", "DeadlineExceeded", "Failed",
        lambda o: {"job": job(o, conditions=[condition("Failed", "DeadlineExceeded")], spec={
            "activeDeadlineSeconds": 60}), "pods": (
            pod(o, phase="Failed", state=said("Interrupted", "saved", 143)),)},
    ),
    "failed, and its pods are gone": (
        "Waiting", "ResultLost", "InProgress", lambda o: {"job": job(o, **FAILED_JOB)},
    ),
    "failed at once, and its pod is gone": (
        "Waiting", "ResultLost", "InProgress", lambda o: {"job": job(o, **FATAL_JOB)},
    ),
    "failed at once, and a pod of an earlier attempt is all that is left": (
        "Waiting", "ResultLost", "InProgress",
        lambda o: {"job": job(o, **{**FATAL_JOB, "failed": 2}), "pods": (
            pod(o, phase="Failed", state=said("InternalError", "x", 1)),)},
    ),
    "all attempts failed, and a pod of an earlier one is all that is left": (
        "Waiting", "ResultLost", "InProgress",
        lambda o: {"job": job(o, age=7200, **FAILED_JOB), "pods": (
            pod(o, age=7200, phase="Failed", state=long_ago(said("InternalError", "x", 1))),)},
    ),
    "all attempts failed, and those before the last one are gone": (
        "Failed", "InternalError", "Failed",
        lambda o: {"job": job(o, age=7200, **FAILED_JOB), "pods": (
            pod(o, phase="Failed", state=said("InternalError", "x", 1)),)},
    ),
    "all attempts failed, and the Job's controller was late to notice": (
        "Failed", "InternalError", "Failed",
        lambda o: {"job": job(o, age=7200, **{**FAILED_JOB, "failed": 1}), "pods": (
            pod(o, age=7200, phase="Failed", state=long_ago(said("InternalError", "x", 1))),)},
    ),
    "evicted while running: no own fault, another pod follows": (
        "Pending", "Retrying", "InProgress",
        lambda o: {"job": job(o), "pods": (pod(o, phase="Failed", state=exited(137), conditions=[
            condition("DisruptionTarget", "EvictionByEvictionAPI", "evicting")]),)},
    ),
    "complete, but the image left no result": (
        "Failed", "InternalError", "Failed",
        lambda o: {"job": job(o, conditions=[condition("Complete")]), "pods": (
            pod(o, phase="Succeeded", state=exited(0, message="bye")),)},
    ),
    "complete, but the pod is gone: looked for again": (
        "Waiting", "ResultLost", "InProgress", lambda o: {"job": job(o, **COMPLETE_JOB)},
    ),
    "complete, but an evicted pod is all that is left": (
        "Waiting", "ResultLost", "InProgress",
        lambda o: {"job": job(o, **COMPLETE_JOB), "pods": (
            pod(o, phase="Failed", state=exited(137), reason="Evicted", message="low on resource"),)},
    ),
    "Job deleted by hand while running": (
        "Pending", "JobDeleted", "InProgress", lambda o: {"job": job(o, deleting=True)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_state(name: str) -> None:
    phase, reason, health, seen = STATES[name]
    obj = finetune()
    plan = run(obj, **seen(obj))
    assert (plan.status["phase"], ready(plan)[1], kstatus(plan)) == (phase, reason, health)
    assert plan.status["observedGeneration"] == 1
    assert all(c["observedGeneration"] == 1 for c in plan.status["conditions"])
    over = phase == "Failed" and "nextRetryTime" not in plan.status
    assert ("Failed" in [c["type"] for c in plan.status["conditions"]]) == over


@pytest.mark.parametrize("name", STATES)
def test_deciding_twice_changes_nothing(name: str) -> None:
    obj = finetune()
    seen = STATES[name][3](obj)
    first = run(obj, **seen)
    second = run(after(obj, first), **seen)
    if name == "nothing there yet: the Job is made":
        assert second == first  # the write was lost: the same write again
    else:
        assert second.status == first.status
        assert not second.events


def test_the_sentence_for_out_of_memory_names_the_limit() -> None:
    plan = run(finetune(), **STATES["out of memory to the end"][3](finetune()))
    assert "512Mi" in plan.status["lastFailure"]["message"]
    assert plan.status["lastFailure"]["exitCode"] == 137


def test_what_a_stopped_pod_could_not_save_is_told_once() -> None:
    obj = finetune()
    words = "Stopped after step 9000 of 10000; saved up to 100: no space left."
    alive = pod(obj, state=RUNNING)
    stopped = pod(obj, phase="Failed", state=said("Interrupted", words, 143))
    nxt = pod(obj, phase="Pending", state=waiting("ContainerCreating"), name="p2")
    other = pod(obj, state=RUNNING, name="p2")
    first = after(obj, run(obj, job=job(obj), pods=(alive,)))
    second = after(obj, run(first, job=job(obj), pods=(deleting(alive),)))
    looks = (first, (stopped,)), (second, (stopped, nxt)), (second, (stopped, other)), (first, (stopped, other))
    for before, pods in looks:
        plan = run(before, job=job(obj), pods=pods)
        assert [(event.reason, event.message) for event in plan.events] == [("Interrupted", words)]
        assert not run(after(obj, plan), job=job(obj), pods=pods).events


def test_what_a_pod_could_not_save_that_the_user_stopped_is_told_once() -> None:
    """Whoever suspended the run may drain the node now."""
    words = "Stopped after step 9000 of 10000; saved up to 100: no space left."
    asked, resumed = finetune(suspend=True), finetune()
    alive, stopped = pod(asked, state=RUNNING), pod(asked, phase="Failed", state=said("Interrupted", words, 143))
    first = after(asked, run(resumed, job=job(asked), pods=(alive,)))
    saving = run(first, job=job(asked), pods=(alive,))
    assert saving.events == ()
    seen: dict[str, Any] = {"job": job(asked, spec={"suspend": True}), "pods": (stopped,)}
    for obj in (asked, resumed):
        plan = run(after(obj, saving), **seen)
        assert [(event.reason, event.message) for event in plan.events] == [("Interrupted", words)]
        assert [run(after(then, plan), **seen).events for then in (obj, resumed)] == [(), ()]


def test_success_keeps_the_result() -> None:
    obj = finetune()
    lineage = [{"kind": "model", "uri": "oci://r/base:1", "digest": "sha256:bb"}]
    state = succeeded(lineage=lineage, metrics={"exactMatch": 0.97})
    plan = run(obj, job=job(obj), pods=(pod(obj, phase="Succeeded", state=state),))
    assert plan.status["artifact"] == ARTIFACT
    assert plan.status["lineage"] == {"digest": "sha256:aa", "parents": [{**lineage[0], "name": ""}]}
    assert plan.status["metrics"] == {"exactMatch": 0.97}
    assert plan.status["quality"] == "0.97"
    assert plan.status["progress"]["percent"] == 100
    assert plan.status["completionTime"] == at(-5)
    assert [event.reason for event in plan.events] == ["Succeeded"]


def test_what_is_measured_but_not_finite_is_left_out() -> None:
    obj = finetune()
    plan = run(obj, job=job(obj), pods=(pod(obj, state=succeeded(metrics={"loss": 1.5}), phase="Succeeded"),))
    assert plan.status["metrics"] == {"loss": 1.5}
    broken = succeeded()
    broken["terminated"]["message"] = broken["terminated"]["message"].replace(
        '"format"', '"metrics": {"perplexity": Infinity, "loss": 2.0}, "format"'
    )
    plan = run(obj, job=job(obj), pods=(pod(obj, state=broken, phase="Succeeded"),))
    assert plan.status["metrics"] == {"loss": 2.0}


def test_sizes_of_a_quantized_model() -> None:
    obj = ours("QuantizedModel", {"source": {"uri": "oci://r/m:1"}}, name="q")
    state = succeeded(size="12 MB (25 %)", delta="-0.4 %")
    plan = run(obj, job=job(obj), pods=(pod(obj, state=state, phase="Succeeded"),))
    assert (plan.status["size"], plan.status["delta"]) == ("12 MB (25 %)", "-0.4 %")


def finished(**spec: Any) -> Object:
    obj = finetune(**spec)
    plan = run(obj, job=job(obj), pods=(pod(obj, phase="Succeeded", state=succeeded()),))
    return after(obj, plan)


def test_a_finished_object_whose_job_is_gone_is_left_alone() -> None:
    obj = finished()
    plan = run(obj)
    assert plan.status == obj["status"]
    assert plan.apply == plan.delete == ()
    assert plan.requeue is None


def test_a_finished_job_stays_until_its_time_and_then_goes() -> None:
    obj = finished(ttlSecondsAfterFinished=100)
    assert run(obj, job=job(obj, **COMPLETE_JOB)).requeue == 95.0
    late = finished(ttlSecondsAfterFinished=3)
    plan = run(late, job=job(late, **COMPLETE_JOB))
    assert [key.name for key in plan.delete] == ["tune-finetune"]
    assert plan.status == late["status"]


def test_a_job_without_time_limit_stays() -> None:
    obj = finished()
    plan = run(obj, job=job(obj, **COMPLETE_JOB))
    assert (plan.delete, plan.requeue) == ((), None)


# What is said, and when.


def test_quota_is_named() -> None:
    obj = finetune()
    owned = job(obj)
    event = {
        "reason": "FailedCreate",
        "lastTimestamp": at(-1),
        "involvedObject": {"uid": "job-1"},
        "message": 'Error creating: pods "x" is forbidden: exceeded quota: q, requested: cpu=9, limited: cpu=1',
    }
    plan = run(obj, job=owned, events=(event,))
    assert ready(plan) == ("False", "QuotaExceeded")
    assert "requested: cpu=9" in of({"status": plan.status}, "Ready")["message"]  # type: ignore[index]
    assert plan.requeue is not None
    again = run(obj, job=owned, events=({**event, "message": event["message"].replace('"x"', '"y"')},))
    assert again.status == plan.status, "another try of the Job's controller is no news"
    other = run(obj, job=owned, events=({**event, "involvedObject": {"uid": "another"}},))
    assert ready(other)[1] == "Starting"
    psa = {**event, "message": "Error creating: pods violates PodSecurity"}
    assert ready(run(obj, job=owned, events=(psa,)))[1] == "PodRefused"


def test_image_trouble_does_not_flap() -> None:
    obj = finetune()
    pulling = pod(obj, phase="Pending", state=waiting("ErrImagePull", "manifest unknown"))
    first = run(obj, job=job(obj), pods=(pulling,))
    backing_off = pod(obj, phase="Pending", state=waiting("ImagePullBackOff", "Back-off pulling image"))
    second = run(after(obj, first), job=job(obj), pods=(backing_off,))
    assert second.status == first.status
    assert "manifest unknown" in of({"status": second.status}, "Ready")["message"]  # type: ignore[index]


def test_each_failed_attempt_is_told_once() -> None:
    obj = finetune()
    bad = pod(obj, phase="Failed", state=exited(1))
    plan = run(obj, job=job(obj, failed=1), pods=(bad,))
    assert [event.reason for event in plan.events] == ["AttemptFailed"]
    assert plan.status["attempts"] == 1
    new = pod(obj, name="tune-def", age=10, state=RUNNING)
    assert run(after(obj, plan), job=job(obj, failed=1), pods=(bad, new)).events == ()


PROGRESS = [
    # old (percent, stage, seconds ago), new (percent, stage), written
    (None, (0, "Starting"), False),
    (None, (0, "Pulling"), True),
    ((10, "Training", 5), (12, "Training"), False),
    ((10, "Training", 9), (80, "Training"), False),
    ((10, "Training", 9), (11, "Evaluating"), False),
    ((10, "Training", 11), (14, "Training"), False),
    ((10, "Training", 11), (15, "Training"), True),
    ((10, "Training", 11), (11, "Evaluating"), True),
    ((10, "Training", 31), (11, "Training"), True),
    ((10, "Training", 31), (10, "Training"), False),
]


@pytest.mark.parametrize(("old", "new", "written"), PROGRESS)
def test_progress_is_written_when_it_is_worth_a_write(
    old: tuple[int, str, float] | None, new: tuple[int, str], written: bool
) -> None:
    obj = finetune()
    before = run(obj, job=job(obj), pods=(pod(obj, state=RUNNING),)).status
    if old:
        before["progress"] = Progress(percent=old[0], stage=old[1], time=at(-old[2])).wire()
    obj = finetune(before)
    seen = Progress(percent=new[0], stage=new[1])
    plan = run(obj, job=job(obj), pods=(pod(obj, state=RUNNING),), progress=seen)
    assert (plan.status != before) == written
    assert plan.requeue == 3.0


@pytest.mark.parametrize(
    ("run_seconds", "age", "written"),
    [(600, 31, True), (1200, 59, False), (1200, 61, True), (86400, 299, False), (86400, 301, True)],
)
def test_a_long_run_writes_small_moves_less_often(run_seconds: int, age: int, written: bool) -> None:
    obj = finetune()
    before = run(obj, job=job(obj), pods=(pod(obj, state=RUNNING),)).status
    before |= {"startTime": at(-run_seconds), "progress": Progress(percent=10, stage="Training", time=at(-age)).wire()}
    seen = Progress(percent=11, stage="Training")
    plan = run(finetune(before), job=job(obj), pods=(pod(obj, state=RUNNING),), progress=seen)
    assert (plan.status != before) == written


def test_writes_of_a_quiet_life_are_few() -> None:
    """Waiting, Job, Pending, Running, Succeeded and its Event: six writes."""
    obj = finetune()
    steps: list[dict[str, Any]] = [
        {"blocked": Blocked("SourceNotReady", "Waits.", None)},
        {"wanted": WANTED, "inputs": "m1.s1"},
        {"job": job(obj)},
        {"job": job(obj), "pods": (pod(obj, phase="Pending", state=waiting("ContainerCreating")),)},
        {"job": job(obj), "pods": (pod(obj, state=RUNNING),)},
        {"job": job(obj), "pods": (pod(obj, state=RUNNING),)},
        {"job": job(obj), "pods": (pod(obj, phase="Succeeded", state=succeeded()),)},
        {"job": job(obj, conditions=[condition("Complete")])},
    ]
    writes = 0
    for step in steps:
        plan = run(obj, **step)
        writes += len(plan.apply) + len(plan.delete) + len(plan.events) + (plan.status != obj["status"])
        obj = after(obj, plan)
    assert obj["status"]["phase"] == "Succeeded"
    assert writes == 6


@pytest.mark.parametrize(("age", "written"), [(9, False), (11, True)])
def test_a_run_of_seconds_has_no_progress_to_write(age: float, written: bool) -> None:
    obj = finetune()
    before = {**run(obj, job=job(obj), pods=(pod(obj, state=RUNNING),)).status, "startTime": at(-age)}
    seen = Progress(percent=40, stage="Training")
    plan = run(finetune(before), job=job(obj), pods=(pod(obj, state=RUNNING),), progress=seen)
    assert ("progress" in plan.status) == written
