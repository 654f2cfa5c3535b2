"""What somebody has to mend, and how the delays of both kinds of retries grow and begin anew."""

import json

import pytest
from tests.unit.objects import Object, at, exited, finetune, job, of, ours, pod, said
from tests.unit.test_batch_again import MAP, edited
from tests.unit.test_batch_life import FATAL_JOB, WANTED, after, kstatus, ready, run

PIN, COMMIT = "@sha256:" + "a" * 64, "@" + "b" * 40
BAD_MODEL, BAD_DATA = said("UnsupportedModel", "a BertModel", 3), said("BadDataset", "line 3", 3)
GARBAGE = said("TeacherAnswersRejected", "0 of 20", 3)
# What is refused, where model and dataset come from, and whether it can be mended there.
MENDABLE: dict[str, tuple[Object, Object, bool]] = {
    "a model by a tag": (BAD_MODEL, {"base": {"uri": "oci://r/m:1"}}, True),
    "a model by no tag": (BAD_MODEL, {"base": {"uri": "oci://r/m"}}, True),
    "a model by its digest": (BAD_MODEL, {"base": {"uri": "oci://r/m:1" + PIN}}, False),
    "a model in a folder": (BAD_MODEL, {"base": {"uri": "pvc://models/m"}}, True),
    "a model in a folder by its digest": (BAD_MODEL, {"base": {"uri": "pvc://models/m" + PIN}}, False),
    "a model of a hub's branch": (BAD_MODEL, {"base": {"uri": "hf://org/m@main"}}, True),
    "a model of a hub's default branch": (BAD_MODEL, {"base": {"uri": "hf://org/m"}}, True),
    "a model by a hub's commit": (BAD_MODEL, {"base": {"uri": "hf://org/m" + COMMIT}}, False),
    "an object's model": (BAD_MODEL, {"base": {"ref": {"kind": "FineTuneJob", "name": "f"}}}, False),
    "data by a tag": (BAD_DATA, {}, True),
    "data by its digest": (BAD_DATA, {"dataset": {"uri": "oci://r/d:1" + PIN}}, False),
    "data of a hub's commit": (BAD_DATA, {"dataset": {"uri": "hf://datasets/org/d" + COMMIT}}, False),
    "data of a ConfigMap": (BAD_DATA, {"dataset": MAP}, False),  # its change lets it go on at once
    "held-out data by a tag": (BAD_DATA, {"dataset": MAP, "evaluation": {"dataset": {"uri": "oci://r/d:1"}}}, True),
    "what nobody can mend there": (said("NothingToTrain", "x", 3), {}, False),
}


@pytest.mark.parametrize("name", MENDABLE)
def test_what_can_be_mended_behind_its_uri_is_looked_at_again_later(name: str) -> None:
    state, spec, mendable = MENDABLE[name]
    obj = finetune(**spec)
    plan = run(obj, job=job(obj, **FATAL_JOB), pods=(pod(obj, phase="Failed", state=state),))
    assert plan.status.get("nextRetryTime") == (at(600) if mendable else None)
    assert (kstatus(plan), plan.status["phase"]) == ("Failed", "Failed")
    if mendable:  # as long as it waits, and no longer
        waits = run(after(obj, plan), job=job(obj, **FATAL_JOB), inputs="m1.s2")
        assert (waits.status["conditions"], waits.status["phase"]) == (plan.status["conditions"], "Failed")
        assert waits.apply == ()
        assert of({"status": plan.status}, "Failed") is None
        due = after(obj, plan)
        due["status"]["nextRetryTime"] = at(-1)
        assert kstatus(run(due, job=job(due, **FATAL_JOB))) == "InProgress"


def distil(retries: int = 0) -> Object:
    spec = {"teacher": {"endpoint": {"url": "http://t/v1", "model": "m"}}, "data": {"prompts": {"uri": "oci://r/d:1"}}}
    status = {"observedGeneration": 1, "retries": retries}
    return ours("DistillationJob", {**spec, "student": {"uri": "oci://r/m" + PIN}}, status=status)


@pytest.mark.parametrize(("retries", "seconds"), [(0, 600), (1, 1200), (5, 19200), (6, 21600), (400, 21600)])
def test_what_somebody_has_to_mend_is_looked_at_a_few_times_a_day(retries: int, seconds: int) -> None:
    obj = distil(retries)
    state = {"terminated": {**GARBAGE["terminated"], "startedAt": at(-86400)}}  # a long try was paid for, too
    plan = run(obj, job=job(obj, **FATAL_JOB), pods=(pod(obj, phase="Failed", state=state),))
    assert (ready(plan), plan.status["nextRetryTime"]) == (("False", "TeacherAnswersRejected"), at(seconds))
    assert plan.status["retries"] == retries
    waits = run(after(obj, plan), job=job(obj, **FATAL_JOB), inputs="m1.s2")  # a renewed token
    assert (waits.status, waits.delete, waits.apply) == (plan.status, (), ())
    mended = run(after(obj, plan), job=job(obj, **FATAL_JOB), inputs="m2.s1")
    assert (mended.status["nextRetryTime"], mended.requeue) == (at(0), 0.0)


@pytest.mark.parametrize("age", [60, 0])
def test_who_suspends_and_resumes_does_not_wait(age: float) -> None:
    """A Job that failed within its first second is no younger than the retry."""
    obj = distil(5)
    plan = run(obj, job=job(obj, age=age, **FATAL_JOB), pods=(pod(obj, phase="Failed", state=GARBAGE),))
    obj = edited(after(obj, plan), suspend=True)
    suspended = run(obj, job=job(obj, age=age, **FATAL_JOB))
    due = at(0 if age else 1)
    assert (suspended.status["nextRetryTime"], len(suspended.delete)) == (due, 1)
    later = after(obj, suspended)
    later["status"]["nextRetryTime"] = at(-60)
    assert run(later).status == later["status"]  # no write each time that it is looked at
    resumed = run(edited(later, suspend=False), wanted=WANTED, inputs="m1.s1")
    assert (resumed.apply, resumed.status["retries"]) == ((WANTED,), 6)


QUIET_TEACHER, GONE = said("TeacherUnavailable", "503", 3), said("SourceUnavailable", "503", 1)


@pytest.mark.parametrize(
    ("before", "now", "seconds"),
    [
        (QUIET_TEACHER, GARBAGE, 600),  # up again in the morning, with a wrong model
        (BAD_DATA, GONE, 30),  # mended after two days, and the hub has a hiccup
        (QUIET_TEACHER, GONE, 3600),
        (BAD_DATA, GARBAGE, 21600),
        (said("LossDiverged", "nan", 3), GARBAGE, 600),  # that try was of a changed ConfigMap
    ],
)
@pytest.mark.parametrize("noticed", [False, True])
def test_the_delays_begin_anew_with_a_fault_of_another_kind(
    before: Object, now: Object, seconds: int, noticed: bool
) -> None:
    """Also where a pass sees the pod's end before the Job's controller does."""
    obj = distil(8)
    obj["status"]["lastFailure"] = {**json.loads(before["terminated"]["message"]), "time": at(-900)}
    pods = (pod(obj, phase="Failed", state=now),)
    if noticed:
        obj = after(obj, run(obj, job=job(obj, failed=1), pods=pods))
        assert obj["status"]["lastFailure"]["reason"] == json.loads(now["terminated"]["message"])["reason"]
    plan = run(obj, job=job(obj, **FATAL_JOB), pods=pods)
    assert plan.status["nextRetryTime"] == at(seconds)


def test_a_fault_of_the_pods_own_takes_no_retry_back() -> None:
    obj = distil(3)
    obj["status"]["lastFailure"] = {"reason": "AccessDenied", "time": at(-900)}
    plan = run(obj, job=job(obj, failed=1), pods=(pod(obj, phase="Failed", state=exited(1)),))
    assert (plan.status["lastFailure"]["reason"], plan.status["retries"]) == ("InternalError", 3)


def test_what_was_changed_before_somebody_found_it_delays_no_look() -> None:
    obj = distil(8)
    plan = run(obj, job=job(obj, **FATAL_JOB), pods=(pod(obj, phase="Failed", state=GARBAGE),))
    changed = run(after(obj, plan), job=job(obj, **FATAL_JOB), inputs="m2.s1")
    made = run(after(obj, changed), wanted=WANTED, inputs="m2.s1")
    assert (made.apply, made.status["retries"]) == ((WANTED,), 1)
