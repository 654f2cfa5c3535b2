"""Suspending, queueing, trying again: decide() of a batch object that does not go straight on."""

from typing import Any

import pytest
from tests.unit.objects import RUNNING, Object, at, condition, exited, finetune, job, of, pod, said, succeeded
from tests.unit.test_batch_life import FAILED_JOB, FATAL_JOB, WANTED, after, kstatus, ready, run

from slmops.reconcile.batch_pass import Blocked
from slmops.reconcile.state import Plan

# Suspending and queueing.


def test_suspended_from_the_start_costs_no_job() -> None:
    plan = run(finetune(suspend=True))
    assert (plan.status["phase"], ready(plan)) == ("Suspended", ("False", "Suspended"))
    assert plan.apply == plan.delete == ()
    assert of({"status": plan.status}, "Suspended")["status"] == "True"  # type: ignore[index]


def test_suspending_suspends_the_job_and_waits_for_its_pod() -> None:
    obj = finetune(suspend=True)
    plan = run(obj, job=job(obj), pods=(pod(obj, state=RUNNING),))
    assert plan.apply[0]["spec"]["suspend"] is True
    assert plan.apply[0]["metadata"]["resourceVersion"] == "7"
    assert "saves a checkpoint" in of({"status": plan.status}, "Ready")["message"]  # type: ignore[index]


def test_resuming_resumes_the_job_and_clears_the_condition() -> None:
    suspended = run(finetune(suspend=True), job=job(finetune()))
    obj = finetune(suspended.status, generation=2)
    change = suspended.apply[0]
    plan = run(obj, job=job(obj, spec=change["spec"], annotations=change["metadata"]["annotations"]))
    assert plan.apply[0]["spec"]["suspend"] is False
    assert of({"status": plan.status}, "Suspended") is None
    gone_on = plan.apply[0]["metadata"]["annotations"]
    obj = after(obj, plan)
    again = run(obj, job=job(obj, spec={"suspend": True}, annotations=gone_on))  # by Kueue, or by a person
    assert (again.status["phase"], again.apply) == ("Queued", ())


def test_a_job_that_somebody_else_suspends_is_theirs_to_resume() -> None:
    """Kueue's manageJobsWithoutQueueName: what the operator resumed, Kueue would suspend again, and so on."""
    obj = finetune()
    plan = run(obj, job=job(obj, spec={"suspend": True}))
    assert (plan.status["phase"], plan.apply) == ("Queued", ())
    assert "spec.queueName" in of({"status": plan.status}, "Ready")["message"]  # type: ignore[index]
    limits = run(finetune(backoffLimit=9), job=job(obj, spec={"suspend": True}))
    assert [limits.apply[0]["spec"][name] for name in ("suspend", "backoffLimit")] == [True, 9]


def test_a_job_that_an_older_operator_suspended_is_resumed_with_its_object() -> None:
    """It wrote nothing on the Job; the object's own status knows."""
    suspended = run(finetune(suspend=True), job=job(finetune()))
    obj = finetune(suspended.status, generation=2)
    plan = run(obj, job=job(obj, spec={"suspend": True}))
    assert (plan.status["phase"], [one["spec"]["suspend"] for one in plan.apply]) == ("Pending", [False])
    assert of({"status": plan.status}, "Suspended") is None
    assert run(obj, job=queued(obj, spec={"suspend": True})).apply == ()  # a queued one is Kueue's all the same


def test_a_new_job_that_somebody_else_suspends_is_theirs_though_the_status_says_suspended_still() -> None:
    """Its object was just resumed, and the operator killed right after it made the Job."""
    suspended = finetune(run(finetune(suspend=True)).status, generation=2)
    of(suspended, "Suspended")["lastTransitionTime"] = at(-300)  # type: ignore[index]
    plan = run(suspended, job=job(suspended, age=60, spec={"suspend": True}))
    assert (plan.status["phase"], plan.apply) == ("Queued", ())


def test_what_somebody_else_suspended_before_the_object_was_is_theirs_to_resume() -> None:
    suspended = run(finetune(suspend=True), job=job(finetune(), spec={"suspend": True}))
    assert suspended.status["phase"] == "Suspended"
    noted = suspended.apply[0]["metadata"]["annotations"]
    obj = finetune(suspended.status, generation=2)
    for _ in range(2):
        plan = run(obj, job=job(obj, spec={"suspend": True}, annotations=noted))
        assert (plan.status["phase"], plan.apply) == ("Queued", ())
        obj = after(obj, plan)
    again = finetune(plan.status, suspend=True)
    assert run(again, job=job(again, spec={"suspend": True}, annotations=noted)).apply == ()


def test_a_job_that_somebody_else_resumes_under_a_suspended_object_is_suspended_by_it() -> None:
    suspended = run(finetune(suspend=True), job=job(finetune(), spec={"suspend": True}))
    obj = finetune(suspended.status, suspend=True)
    change = run(obj, job=job(obj, annotations=suspended.apply[0]["metadata"]["annotations"])).apply[0]
    assert change["spec"]["suspend"] is True
    obj = finetune(suspended.status, generation=2)
    plan = run(obj, job=job(obj, spec=change["spec"], annotations=change["metadata"]["annotations"]))
    assert [one["spec"]["suspend"] for one in plan.apply] == [False]


def queued(owner: Object, **more: Any) -> Object:
    """Its Job, with the label that the operator sets for queueName, and Kueue itself where there is a default queue."""
    made = job(owner, **more)
    made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    return made


@pytest.mark.parametrize("spec", [{"queueName": "gpus"}, {}])
def test_a_queued_job_is_kueues_until_it_is_admitted(spec: Object) -> None:
    obj = finetune(**spec)
    plan = run(obj, job=queued(obj, spec={"suspend": True}))
    assert plan.status["phase"] == "Queued"
    assert "queue gpus" in of({"status": plan.status}, "Ready")["message"]  # type: ignore[index]
    assert plan.apply == ()
    admitted = run(obj, job=queued(obj), pods=(pod(obj, state=RUNNING),))
    assert (admitted.status["phase"], admitted.apply) == ("Running", ())


@pytest.mark.parametrize("spec", [{"queueName": "gpus"}, {}])
def test_suspending_a_queued_object_takes_it_out_of_the_queue(spec: Object) -> None:
    obj = finetune(suspend=True, **spec)
    plan = run(obj, job=queued(obj, spec={"suspend": True}))
    assert [key.kind for key in plan.delete] == ["Job"]
    assert plan.apply == ()


def test_limits_may_change_while_it_runs() -> None:
    obj = finetune(backoffLimit=7, activeDeadlineSeconds=900)
    plan = run(obj, job=job(obj), pods=(pod(obj, state=RUNNING),))
    assert plan.apply[0]["spec"]["backoffLimit"] == 7
    assert plan.apply[0]["spec"]["activeDeadlineSeconds"] == 900
    assert plan.apply[0]["spec"]["template"] == {"spec": {"containers": []}}


# Trying again.


def world_failed(retries: int = 0) -> tuple[Object, Plan]:
    obj = finetune({"observedGeneration": 1, "retries": retries})
    bad = pod(obj, phase="Failed", state=said("StoreUnavailable", "503", 1))
    return obj, run(obj, job=job(obj, **FAILED_JOB), pods=(bad,))


UNNAMED = {
    "job": job(finetune(), inputs="", **FAILED_JOB),
    "pods": (pod(finetune(), phase="Failed", state=said("StoreUnavailable", "503", 1)),),
}


@pytest.mark.parametrize(("retries", "seconds"), [(0, 30), (1, 60), (4, 480), (7, 3600), (400, 3600)])
def test_delay_grows_to_an_hour(retries: int, seconds: int) -> None:
    _, plan = world_failed(retries)
    assert plan.status["nextRetryTime"] == at(seconds)
    assert plan.requeue == 5.0  # the Secrets and ConfigMaps that it names are looked at meanwhile
    without = run(finetune({"observedGeneration": 1, "retries": retries}), **UNNAMED)
    assert without.requeue == seconds


@pytest.mark.parametrize("code", [1, 3])
def test_a_try_that_got_on_begins_the_delays_anew(code: int) -> None:
    """Six outages within a month are not one that lasts."""
    obj = finetune({"observedGeneration": 1, "retries": 6})
    state = said("StoreUnavailable", "503", code)
    state["terminated"]["startedAt"] = at(-3600)
    plan = run(obj, job=job(obj, **FAILED_JOB), pods=(pod(obj, phase="Failed", state=state),))
    assert (plan.status["nextRetryTime"], plan.status.get("retries", 0)) == (at(30), 0)


def test_what_nobody_could_read_is_tried_until_it_can_be() -> None:
    """The operator was away, and each time the pod's node with it: only what a pod said ends the object."""
    obj = finetune()
    for number, seconds in enumerate((30, 60, 120)):
        plan = run(obj, job=job(obj, **FATAL_JOB))
        assert (plan.status["phase"], ready(plan)[1]) == ("Waiting", "ResultLost")
        assert (plan.status.get("retries", 0), plan.status["nextRetryTime"]) == (number, at(seconds))
        assert "goes on from its checkpoint. PodFailurePolicy: Container worker failed" in str(
            plan.status["conditions"]
        )
        assert [event.reason for event in plan.events] == ["ResultLost"]
        due = after(obj, plan)
        due["status"]["nextRetryTime"] = at(-1)
        obj = after(due, run(due, wanted=WANTED, inputs="m1.s1"))
    read = run(obj, job=job(obj, **FATAL_JOB), pods=(pod(obj, phase="Failed", state=said("LossDiverged", "nan", 3)),))
    assert (read.status["phase"], ready(read)[1]) == ("Failed", "LossDiverged")


@pytest.mark.parametrize(
    ("jobs", "code", "seconds", "reason"),
    [
        (FATAL_JOB, 3, -90, "LossDiverged"),
        (FATAL_JOB, 3, -101, "ResultLost"),  # before this Job
        (FATAL_JOB, 1, -50, "ResultLost"),  # of an earlier attempt
        (FAILED_JOB, 1, -14, "LossDiverged"),
        (FAILED_JOB, 1, -15, "ResultLost"),  # ten seconds before the Job failed: another pod may have followed
    ],
)
def test_what_was_noted_of_a_pod_that_is_gone_counts_if_it_was_the_last(
    jobs: dict[str, Any], code: int, seconds: float, reason: str
) -> None:
    noted = {"reason": "LossDiverged", "exitCode": code, "time": at(seconds)}
    obj = finetune({"observedGeneration": 1, "lastFailure": noted})
    assert ready(run(obj, job=job(obj, age=100, **jobs)))[1] == reason


def test_until_then_nothing_happens() -> None:
    obj, plan = world_failed()
    again = run(after(obj, plan), job=job(obj, **FAILED_JOB), inputs="m1.s1")
    assert again.status == plan.status
    assert again.delete == again.apply == ()
    assert again.requeue == 5.0


def test_inputs_are_looked_at_less_often_where_an_outage_lasts() -> None:
    """Where the chart's store needs a Secret every object names one, and each look reads all of them anew."""
    obj, plan = world_failed(9)
    obj = after(obj, plan)
    for one in obj["status"]["conditions"]:
        one["lastTransitionTime"] = at(-86400)
    assert run(obj, job=job(obj, **FAILED_JOB), inputs="m1.s1").requeue == 60.0
    obj["status"]["nextRetryTime"] = at(20)
    assert run(obj, job=job(obj, **FAILED_JOB), inputs="m1.s1").requeue == 20.0


def test_then_the_old_job_goes_and_a_new_one_follows() -> None:
    obj, plan = world_failed()
    obj = after(obj, plan)
    obj["status"]["nextRetryTime"] = at(-1)
    removing = run(obj, job=job(obj, **FAILED_JOB))
    assert [key.name for key in removing.delete] == ["tune-finetune"]
    assert removing.apply == ()
    made = run(after(obj, removing), wanted=WANTED, inputs="m1.s1")
    assert made.apply == (WANTED,)
    assert made.status["retries"] == 1
    assert "nextRetryTime" not in made.status


def test_killed_between_making_the_new_job_and_saying_so() -> None:
    obj, plan = world_failed()
    obj = after(obj, plan)
    obj["status"]["nextRetryTime"] = at(-10)
    plan = run(obj, job=job(obj, age=5), pods=(pod(obj, age=4, state=RUNNING),))
    assert plan.status["phase"] == "Running"
    assert plan.status["retries"] == 1
    assert "nextRetryTime" not in plan.status


def test_a_changed_secret_ends_the_wait_at_once() -> None:
    obj, plan = world_failed()
    plan = run(after(obj, plan), job=job(obj, **FAILED_JOB), inputs="m1.s2")
    assert (plan.status["nextRetryTime"], plan.delete, plan.apply, plan.requeue) == (at(0), (), (), 0.0)
    removing = run(after(obj, plan), job=job(obj, **FAILED_JOB), inputs="m1.s2")
    assert [key.kind for key in removing.delete] == ["Job"]
    assert removing.status == plan.status  # said already: no write
    assert run(after(obj, plan), job=job(obj, deleting=True, **FAILED_JOB), inputs="m1.s2").delete == ()
    made = run(after(obj, plan), wanted=WANTED, inputs="m1.s2")
    assert made.apply == (WANTED,)
    assert made.status["inputs"] == "m1.s2"


def test_a_hash_of_a_former_operator_ends_no_wait() -> None:
    """Else an upgrade would bring back at once whatever waits for a store that is down."""
    obj, plan = world_failed()
    obj = after(obj, plan)
    obj["status"]["inputs"] = "0123456789abcdef"
    kept = run(obj, job=job(obj, **FAILED_JOB), inputs="m1.s1")
    assert (kept.status["nextRetryTime"], ready(kept), kept.requeue) == (at(30), ready(plan), 5.0)
    changed = run(after(obj, kept), job=job(obj, **FAILED_JOB), inputs="m1.s2")
    assert (changed.status["nextRetryTime"], changed.requeue) == (at(0), 0.0)


MAP = {"configMap": {"name": "data", "key": "train"}}


def failed_for_good(state: Object, jobs: dict[str, Any], **spec: Any) -> Object:
    obj = finetune(**spec)
    plan = run(obj, job=job(obj, **jobs), pods=(pod(obj, phase="Failed", state=state),))
    assert plan.status["phase"] == "Failed"
    return after(obj, plan)


def edited(obj: Object, **spec: Any) -> Object:
    metadata = {**obj["metadata"], "generation": obj["metadata"]["generation"] + 1}
    return {**obj, "metadata": metadata, "spec": {**obj["spec"], **spec}}


def test_failed_stays_failed() -> None:
    obj = failed_for_good(exited(1), FAILED_JOB)
    plan = run(obj, job=job(obj, **FAILED_JOB), inputs="m1.s1")
    assert (plan.status, plan.apply, plan.delete, plan.events) == (obj["status"], (), (), ())
    assert plan.requeue == 60.0  # its inputs are looked at from time to time
    gone = run(obj, wanted=WANTED, inputs="m1.s1")
    assert (gone.status, gone.apply) == (obj["status"], ())  # its Job was removed: still failed


AGAIN: dict[str, tuple[Object, dict[str, Any], dict[str, Any], dict[str, Any], bool]] = {
    # name: container state, Job, spec before, change of the spec, goes on
    "more attempts allowed": (exited(1), FAILED_JOB, {}, {"backoffLimit": 6}, True),
    "fewer attempts allowed": (exited(1), FAILED_JOB, {}, {"backoffLimit": 2}, False),
    "only the TTL changed": (exited(1), FAILED_JOB, {}, {"ttlSecondsAfterFinished": 9}, False),
    "more attempts of what is useless": (said("NothingToTrain", "x", 3), FATAL_JOB, {}, {"backoffLimit": 9}, False),
    "longer deadline": (
        said("Interrupted", "", 143),
        {"conditions": [condition("Failed", "DeadlineExceeded")]},
        {"activeDeadlineSeconds": 30},
        {"activeDeadlineSeconds": 3000},
        True,
    ),
    "no deadline": (
        said("Interrupted", "", 143),
        {"conditions": [condition("Failed", "DeadlineExceeded")]},
        {"activeDeadlineSeconds": 30},
        {"activeDeadlineSeconds": None},
        True,
    ),
    "shorter deadline": (
        said("Interrupted", "", 143),
        {"conditions": [condition("Failed", "DeadlineExceeded")]},
        {"activeDeadlineSeconds": 30},
        {"activeDeadlineSeconds": 10},
        False,
    ),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_change_that_could_help_lets_a_failed_object_go_on(name: str) -> None:
    state, jobs, before, change, goes_on = AGAIN[name]
    obj = edited(failed_for_good(state, jobs, **before), **change)
    plan = run(obj, job=job(obj, **jobs), inputs="m1.s1")
    assert plan.apply == plan.delete == ()
    assert (kstatus(plan) == "InProgress") == goes_on
    assert plan.status["observedGeneration"] == 2
    removing = run(after(obj, plan), job=job(obj, **jobs), inputs="m1.s1")
    assert bool(removing.delete) == goes_on
    assert removing.status == plan.status
    if goes_on:
        made = run(after(obj, removing), wanted=WANTED, inputs="m1.s1")
        assert made.apply == (WANTED,)
        assert of({"status": made.status}, "Failed") is None


@pytest.mark.parametrize("inputs", ["m1.s2", "m1."])
def test_a_renewed_token_does_not_pay_for_a_failed_run_again(inputs: str) -> None:
    """Registry tokens last an hour: no Secret mends a loss that diverged, nor does a Secret of the chart's store."""
    obj = failed_for_good(said("LossDiverged", "the loss is not a number", 3), FATAL_JOB)
    plan = run(obj, job=job(obj, **FATAL_JOB), inputs=inputs)
    assert (plan.status, plan.apply, plan.delete) == (obj["status"], (), ())


def test_a_failed_run_without_configmaps_is_not_looked_at_every_minute() -> None:
    obj = finetune()
    jobs = {"job": job(obj, inputs=".s1", **FATAL_JOB)}
    bad = pod(obj, phase="Failed", state=said("LossDiverged", "x", 3))
    failed = after(obj, run(obj, pods=(bad,), **jobs))
    assert run(failed, inputs=".s2", **jobs).requeue is None


def test_a_configmap_that_is_mended_in_two_steps_is_looked_at_until_it_is_whole() -> None:
    """Deleted and made anew, or broken in another place for a while: nothing is watched that would tell."""
    obj = failed_for_good(said("BadDataset", "line 3", 3), FATAL_JOB, dataset=MAP)
    gone = run(obj, job=job(obj, **FATAL_JOB), blocked=Blocked("ConfigMapNotFound", "ConfigMap data.", 5.0))
    assert (gone.status, gone.requeue) == (obj["status"], 60.0)
    plan = run(after(obj, gone), job=job(obj, **FATAL_JOB), inputs="m2.s1")
    assert ready(plan) == ("False", "Retrying")


def test_a_run_that_succeeded_is_not_looked_at_for_its_configmaps() -> None:
    obj = finetune()
    done = after(obj, run(obj, job=job(obj), pods=(pod(obj, phase="Succeeded", state=succeeded()),)))
    assert done["status"]["inputs"] == "m1.s1"
    assert run(done, job=job(obj, conditions=[condition("Complete")])).requeue is None


def test_a_mended_configmap_lets_a_failed_object_go_on() -> None:
    obj = failed_for_good(said("BadDataset", "line 3", 3), FATAL_JOB, dataset=MAP)
    plan = run(obj, job=job(obj, **FATAL_JOB), inputs="m2.s1")
    assert (ready(plan), plan.delete, plan.requeue) == (("False", "Retrying"), (), 0.0)
    removing = run(after(obj, plan), job=job(obj, **FATAL_JOB), inputs="m2.s1")
    assert [key.kind for key in removing.delete] == ["Job"]


def test_a_hash_of_a_former_operator_lets_no_failed_run_go_on() -> None:
    """It was one of ConfigMaps and Secrets together: else each failed run would be paid for again at an upgrade."""
    obj, former = finetune(), "0123456789abcdef"
    jobs = {"job": job(obj, inputs=former, **FATAL_JOB)}
    bad = pod(obj, phase="Failed", state=said("LossDiverged", "nan", 3))
    obj = after(obj, run(obj, pods=(bad,), **jobs))
    assert obj["status"]["inputs"] == former
    kept = run(obj, **jobs)  # an input is missing: there is nothing to compare with later
    assert kept.status == obj["status"]
    plan = run(obj, inputs="m1.s1", **jobs)
    assert (kstatus(plan), plan.status["inputs"]) == ("Failed", "m1.s1")
    assert kstatus(run(after(obj, plan), inputs="m1.s2", **jobs)) == "Failed"
    assert kstatus(run(after(obj, plan), inputs="m2.s1", **jobs)) == "InProgress"


def test_a_failed_run_that_is_to_be_suspended_is_suspended() -> None:
    obj = edited(failed_for_good(exited(1), FAILED_JOB), backoffLimit=9, suspend=True)
    plan = run(obj, job=job(obj, **FAILED_JOB))
    suspended = run(after(obj, plan), job=job(obj, **FAILED_JOB))
    assert suspended.status["phase"] == "Suspended"
    assert [key.kind for key in suspended.delete] == ["Job"]


@pytest.mark.parametrize(("age", "due"), [(60, 0), (1, 0), (0, 1)])
def test_a_job_is_older_than_the_retry_that_replaces_it_in_whole_seconds_too(age: float, due: float) -> None:
    obj = failed_for_good(said("LossDiverged", "nan", 3), FATAL_JOB)
    plan = run(obj, job=job(obj, age=age, **FATAL_JOB), inputs="m2.s1")
    assert (plan.status["nextRetryTime"], plan.requeue) == (at(due), due)
    assert plan.delete == plan.apply == ()
