"""What hinders a batch object, with its remedy: pods that do not come, do not go, or say strange things."""

from datetime import timedelta
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
from tests.unit.test_batch_life import COMPLETE_JOB, FAILED_JOB, FATAL_JOB, WANTED, after, kstatus, ready, run

from slmops import crdgen
from slmops.api.batch import SECONDS_MAX
from slmops.cluster.memory import MemoryCluster, key_of
from slmops.cluster.port import Key
from slmops.reconcile.batch_pass import Blocked
from slmops.reconcile.driver import Driver
from slmops.reconcile.pods import LOST_AFTER
from slmops.reconcile.state import Plan
from slmops.reconcile.table import reconcilers
from slmops.settings import Settings


def message(plan: Plan) -> str:
    found = of({"status": plan.status}, "Ready")
    assert found is not None
    return str(found["message"])


def going(obj: Object, by: float, *, of_a_job: bool = True) -> Object:
    """A pod that has to be gone by that many seconds from now; the Job's controller holds it as long as its Job is."""
    found = pod(obj, state=RUNNING)
    if of_a_job:
        found["metadata"]["finalizers"] = ["batch.kubernetes.io/job-tracking"]
    found["metadata"]["deletionTimestamp"] = at(by)
    found["spec"]["nodeName"] = "node-7"
    return found


TOO_LATE = -LOST_AFTER.total_seconds() - 1


@pytest.mark.parametrize("of_this_job", [True, False])
def test_a_pod_on_a_dead_node_is_named_with_its_remedy(of_this_job: bool) -> None:
    def plan_of(obj: Object, by: float) -> Plan:
        stuck = (going(obj, by, of_a_job=of_this_job),)
        return run(obj, job=job(obj), pods=stuck) if of_this_job else run(obj, wanted=WANTED, former=stuck)

    obj = finetune()
    slow = plan_of(obj, 20)
    assert ready(slow)[1] == "PodTerminating"
    assert slow.events == ()
    assert slow.requeue is not None  # no event will tell that it is too late
    lost = plan_of(after(obj, slow), TOO_LATE)
    assert ready(lost)[1] == "NodeLost"
    forced = "kubectl -n ns delete pod tune-abc --force"
    taint = "kubectl taint nodes node-7 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    remedies = {name for name in ("kubectl delete node node-7", taint, forced) if name in message(lost)}
    assert remedies == ({"kubectl delete node node-7", taint} if of_this_job else {forced})
    assert [event.reason for event in lost.events] == ["NodeLost"]
    assert plan_of(after(obj, lost), TOO_LATE).events == ()
    assert kstatus(lost) == "InProgress"


@pytest.mark.parametrize("job_is_there", [True, False])
def test_a_suspended_run_whose_pod_is_on_a_dead_node_says_so(job_is_there: bool) -> None:
    """A queued object's Job is removed when it is suspended."""
    obj = finetune(suspend=True)

    def plan_of(obj: Object, by: float) -> Plan:
        stuck = (going(obj, by, of_a_job=job_is_there),)
        return run(obj, job=job(obj), pods=stuck) if job_is_there else run(obj, former=stuck)

    ending = plan_of(obj, 20)
    assert (ready(ending)[1], ending.requeue, ending.events) == ("Suspended", 15.0, ())
    assert "tune-abc saves a checkpoint" in message(ending)
    lost = plan_of(after(obj, ending), TOO_LATE)
    assert (lost.status["phase"], ready(lost)[1]) == ("Suspended", "NodeLost")
    assert "node-7" in message(lost)
    assert [event.reason for event in lost.events] == ["NodeLost"]
    assert plan_of(after(obj, lost), TOO_LATE).events == ()
    gone = run(after(obj, lost), job=job(obj))
    assert (ready(gone)[1], gone.requeue) == ("Suspended", None)
    assert of({"status": gone.status}, "Suspended")["status"] == "True"  # type: ignore[index]


def test_the_charts_mended_image_reaches_a_job_whose_pod_cannot_pull() -> None:
    obj = finetune()
    stuck = pod(obj, phase="Pending", state=waiting("ErrImagePull", "not found"))
    same = run(obj, job=job(obj, image="trainer:1"), pods=(stuck,), image="trainer:1")
    assert (ready(same)[1], same.delete) == ("ImagePullBackOff", ())
    mended = run(after(obj, same), job=job(obj, image="trainer:1"), pods=(stuck,), image="trainer:2")
    assert (ready(mended)[1], mended.status["nextRetryTime"], mended.delete) == ("Retrying", at(0), ())
    assert run(after(obj, mended), job=job(obj, image="trainer:1"), pods=(stuck,), image="trainer:2").delete
    own = run(obj, job=job(obj), pods=(stuck,), image="trainer:2")  # spec.pod.image
    assert ready(own)[1] == "ImagePullBackOff"


@pytest.mark.parametrize("state", [RUNNING, waiting("ContainerCreating"), waiting("CreateContainerConfigError", "x")])
def test_another_image_of_the_chart_stops_no_pod_that_has_its_image(state: Object) -> None:
    obj = finetune()
    plan = run(obj, job=job(obj, image="trainer:1"), pods=(pod(obj, state=state),), image="trainer:2")
    assert "nextRetryTime" not in plan.status
    assert plan.delete == ()


def test_a_missing_claim_is_named() -> None:
    obj = finetune()
    text = '0/1 nodes are available: persistentvolumeclaim "models" not found.'
    waits = pod(obj, phase="Pending", conditions=[condition("PodScheduled", "Unschedulable", text, "False")])
    plan = run(obj, job=job(obj), pods=(waits,))
    assert ready(plan)[1] == "ClaimNotFound"
    assert '"models"' in message(plan)
    assert "create it" in message(plan)


def test_an_output_that_is_a_whole_claim_costs_no_pod() -> None:
    """Stored under an older CRD: its checkpoints would go to another claim, and its model nowhere."""
    cluster = MemoryCluster()
    key = key_of(cluster.put(finetune(output="pvc://models")))
    Driver(cluster, Settings(), reconcilers(lambda address: None), lambda routes: None).run(key)
    stalled = of(cluster.objects[key], "Stalled")
    assert stalled is not None
    assert (stalled["reason"], stalled["message"].startswith("output: ")) == ("InvalidSpec", True)
    assert Key("Job", "ns", "tune-finetune") not in cluster.objects


@pytest.mark.parametrize("field", ["base", "dataset", "evaluation"])
def test_an_output_in_a_folder_that_is_read_costs_no_pod(field: str) -> None:
    read = {"uri": "pvc://models/team"}
    cluster = MemoryCluster()
    obj = finetune(output="pvc://models/team/tuned", **{field: {"dataset": read} if field == "evaluation" else read})
    key = key_of(cluster.put(obj))
    Driver(cluster, Settings(), reconcilers(lambda address: None), lambda routes: None).run(key)
    stalled = of(cluster.objects[key], "Stalled")
    assert stalled is not None
    assert stalled["reason"] == "BadSpec"
    assert "pvc://models/team/tuned lies in pvc://models/team," in stalled["message"]
    assert Key("Job", "ns", "tune-finetune") not in cluster.objects


def test_a_missing_service_account_is_named() -> None:
    obj = finetune()
    text = (
        'Error creating: pods "x-" is forbidden: error looking up service account: serviceaccount "default" not found'
    )
    told = {"reason": "FailedCreate", "lastTimestamp": at(-1), "involvedObject": {"uid": "job-1"}, "message": text}
    plan = run(obj, job=job(obj), events=(told,))
    assert ready(plan)[1] == "ServiceAccountNotFound"
    assert '"default"' in message(plan)


LENGTHS = crdgen.schema(next(kind for kind in crdgen.KINDS if kind.name == "QuantizedModel"))["properties"]["status"]


def fits(schema: Object, value: Any) -> bool:
    """Whether lengths and numbers of items are within the schema."""
    if isinstance(value, dict):
        fields, extra = schema.get("properties") or {}, schema.get("additionalProperties")
        return all(fits(fields.get(name, extra), item) for name, item in value.items())
    if isinstance(value, list):
        return len(value) <= schema.get("maxItems", len(value)) and all(fits(schema["items"], item) for item in value)
    return not isinstance(value, str) or len(value) <= schema.get("maxLength", len(value))


def test_what_a_strange_image_says_can_be_written() -> None:
    """The result comes from a pod: longer than the CRD allows, no status could be written any more."""
    obj = ours("QuantizedModel", {"source": {"uri": "oci://r/m:1"}}, name="q")
    words = dict.fromkeys(("quality", "size", "delta"), "x" * 900)
    plan = run(obj, job=job(obj), pods=(pod(obj, phase="Succeeded", state=succeeded(**words)),))
    assert plan.status["phase"] == "Succeeded"
    assert fits(LENGTHS, plan.status)
    strange = said("My own reason! " * 20, "it broke " * 200, 1)
    plan = run(obj, job=job(obj, **FAILED_JOB), pods=(pod(obj, phase="Failed", state=strange),))
    assert ready(plan)[1] == "InternalError"
    assert "My own reason!" in message(plan)
    assert fits(LENGTHS, plan.status)
    silent = said("", "", 1)
    plan = run(obj, job=job(obj, **FAILED_JOB), pods=(pod(obj, phase="Failed", state=silent),))
    assert "no reason" in message(plan)


ARGUMENT_MAX = 128 * 1024  # bytes of one variable with its name: the kernel's limit


def test_the_largest_spec_fits_into_its_variable() -> None:
    """Beyond the kernel's limit a container cannot be started, and only the kubelet would say so."""
    env = [{"name": f"{'N' * 120}{number:02d}", "value": "\u20ac" * 4096} for number in range(64)]
    spec = {
        "teacher": {"endpoint": {"url": "https://t/v1", "model": "m"}},
        "student": {"uri": "oci://r/m:1"},
        "data": {"prompts": {"uri": "oci://r/p:1"}, "generation": {"systemPrompt": "\u0001" * 16384}},
        "pod": {"env": env},
    }
    cluster = MemoryCluster()
    key = key_of(cluster.put(ours("DistillationJob", spec, name="d")))
    Driver(cluster, Settings(store="oci://s"), reconcilers(lambda address: None), lambda routes: None).run(key)
    container = cluster.objects[Key("Job", "ns", "d-distill")]["spec"]["template"]["spec"]["containers"][0]
    sizes = {entry["name"]: len(f"{entry['name']}={entry['value']}".encode()) + 1 for entry in container["env"]}
    assert sizes["SLMOPS_RUN"] > 64 * 1024
    assert max(sizes.values()) < ARGUMENT_MAX
    assert sizes[env[63]["name"]] > 12_000  # the container has them; only the worker's copy of the spec has not


def test_the_largest_ttl_is_a_date() -> None:
    obj = finetune(ttlSecondsAfterFinished=SECONDS_MAX)
    done = run(obj, job=job(obj), pods=(pod(obj, phase="Succeeded", state=succeeded()),))
    plan = run(after(obj, done), job=job(obj, **COMPLETE_JOB))
    assert plan.requeue is not None
    assert plan.requeue > timedelta(days=20000).total_seconds()


def test_the_deadline_that_was_missed_is_the_jobs_and_not_the_whole_runs() -> None:
    """A run that was tried for hours, and whose last Job had a minute: two minutes are more."""
    obj = finetune({"observedGeneration": 1, "startTime": at(-7200)}, activeDeadlineSeconds=60)
    late = job(obj, conditions=[condition("Failed", "DeadlineExceeded")], spec={"activeDeadlineSeconds": 60})
    failed = after(obj, run(obj, job=late, pods=(pod(obj, phase="Failed", state=said("Interrupted", "", 143)),)))
    assert failed["status"]["phase"] == "Failed"
    metadata = {**failed["metadata"], "generation": 2}
    longer = {**failed, "metadata": metadata, "spec": {**failed["spec"], "activeDeadlineSeconds": 120}}
    assert kstatus(run(longer, job=late)) == "InProgress"
    shorter = {**longer, "spec": {**failed["spec"], "activeDeadlineSeconds": 50}}
    assert kstatus(run(shorter, job=late)) == "Failed"


def test_a_run_that_goes_on_begins_anew_in_time_too() -> None:
    """Else a deadline that is raised again would be held against all the days since its very first pod."""
    obj = finetune({"observedGeneration": 1, "startTime": at(-86400)}, activeDeadlineSeconds=30)
    late = job(obj, conditions=[condition("Failed", "DeadlineExceeded")], spec={"activeDeadlineSeconds": 30})
    stopped = (pod(obj, phase="Failed", state=said("Interrupted", "", 143)),)
    for generation, limit in ((2, 40), (3, 300)):
        failed = after(obj, run(obj, job=late, pods=stopped))
        assert failed["status"]["completionTime"] == at(-5)
        metadata = {**failed["metadata"], "generation": generation}
        raised = {**failed, "metadata": metadata, "spec": {**failed["spec"], "activeDeadlineSeconds": limit}}
        going_on = run(raised, job=late) if generation == 2 else run(raised)  # the second time its Job is gone
        assert kstatus(going_on) == "InProgress"
        assert not {"startTime", "completionTime"} & going_on.status.keys()
        obj = after(raised, run(after(raised, going_on), wanted=WANTED))


def test_bad_exit_of_the_users_own_image_keeps_its_last_words() -> None:
    obj = finetune()
    state = exited(2, message="usage: other-program [-h]")
    plan = run(obj, job=job(obj, **FAILED_JOB), pods=(pod(obj, phase="Failed", state=state),))
    assert "usage: other-program" in message(plan)
    assert ARTIFACT["uri"] not in str(plan.status)
    assert NOW.isoformat()[:10] in str(plan.status["lastFailure"]["time"])


def test_a_run_that_waits_for_days_asks_less_often() -> None:
    obj = finetune()
    missing = Blocked("SecretNotFound", "Secret s does not exist: create it.", 5.0)
    first = run(obj, blocked=missing)
    assert first.requeue == 5.0
    for condition_ in first.status["conditions"]:
        condition_["lastTransitionTime"] = at(-86400)
    assert run(after(obj, first), blocked=missing).requeue == 60.0
    by_event = run(after(obj, first), blocked=Blocked("SourceNotReady", "Waits.", None))
    assert by_event.requeue is None


def test_a_job_without_a_pod_asks_less_often_the_longer_it_waits() -> None:
    obj = finetune()
    owned = job(obj)
    said_so = {
        "reason": "FailedCreate",
        "lastTimestamp": at(0),
        "involvedObject": {"uid": owned["metadata"]["uid"]},
        "message": 'Error creating: pods "x" is forbidden: exceeded quota: team',
    }
    plan = run(obj, job=owned, events=(said_so,))
    assert (ready(plan)[1], plan.requeue) == ("QuotaExceeded", 5.0)
    for condition_ in plan.status["conditions"]:
        condition_["lastTransitionTime"] = at(-1800)
    later = run(after(obj, plan), job=owned, events=(said_so,))
    assert (ready(later)[1], later.requeue) == ("QuotaExceeded", 60.0)
    assert run(after(obj, plan), job=owned).requeue == 60.0


@pytest.mark.parametrize(("age", "seconds"), [(0, 3.0), (60, 3.0), (200, 10.0), (600, 30.0), (86400, 30.0)])
def test_a_long_run_is_asked_for_its_progress_less_often(age: int, seconds: float) -> None:
    obj = finetune()
    began = pod(obj, state=RUNNING)
    began["metadata"]["creationTimestamp"] = at(-age)
    plan = run(obj, job=job(obj), pods=(began,))
    assert (ready(plan)[1], plan.requeue) == ("Running", seconds)


LOST = {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": "could not be located", "finishedAt": None}
NOT_READY = condition("Ready", "PodFailed", status="False")
TIMELESS: dict[str, tuple[Object, str]] = {
    "the node was started anew": ({"state": {"terminated": LOST}, "conditions": [NOT_READY]}, at(-5)),
    "the kubelet did not admit it": ({"reason": "OutOfcpu", "message": "Node didn't have enough resource"}, at(-50)),
    "evicted before it ran": (
        {"reason": "Evicted", "conditions": [condition("DisruptionTarget", "TerminationByKubelet")]}, at(-5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMELESS)
def test_a_pod_that_does_not_say_when_it_failed_is_told_of_once(name: str) -> None:
    """Were the moment of the look its time, each look would find another failure."""
    said, when = TIMELESS[name]
    obj = finetune()
    cluster = MemoryCluster()
    for one in (obj, job(obj, failed=1), pod(obj, phase="Failed", **said)):
        cluster.put(one)
    now = NOW
    driver = Driver(cluster, Settings(), reconcilers(lambda _: None), lambda _: None, clock=lambda: now)
    driver.run(key_of(obj))
    before, told = cluster.objects[key_of(obj)]["status"], list(cluster.posted)
    assert before["lastFailure"]["time"] == when
    assert [event for _, event, _ in told] == ["AttemptFailed"]
    now += timedelta(seconds=3)
    driver.run(key_of(obj))
    assert cluster.objects[key_of(obj)]["status"] == before
    assert cluster.posted == told


def test_a_failed_run_whose_output_is_nowhere_any_more_is_looked_after() -> None:
    """An upgrade of the chart took the store away: the Job's time runs out all the same."""
    obj = finetune(ttlSecondsAfterFinished=3)
    bad = pod(obj, phase="Failed", state=said("NothingToTrain", "x", 3))
    failed = after(obj, run(obj, job=job(obj, **FATAL_JOB), pods=(bad,)))
    cluster = MemoryCluster()
    for one in (failed, job(obj, **FATAL_JOB)):
        cluster.put(one)
    cluster.objects[key_of(obj)]["metadata"]["generation"] = 2
    Driver(cluster, Settings(store=""), reconcilers(lambda _: None), lambda _: None, clock=lambda: NOW).run(key_of(obj))
    assert Key("Job", "ns", "tune-finetune") not in cluster.objects
    status = cluster.objects[key_of(obj)]["status"]
    assert (status["observedGeneration"], status["phase"]) == (2, "Failed")
    assert (of(cluster.objects[key_of(obj)], "Ready") or {})["reason"] == "NothingToTrain"
    assert cluster.posted == []
