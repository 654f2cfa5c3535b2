"""Events of Jobs and their pods: what they tell of a batch object, and when they are read at all."""

import contextlib
from typing import Any

import pytest
from tests.unit.objects import NOW, RUNNING, Object, at, condition, finetune, job, of, pod
from tests.unit.test_batch_life import FAILED_JOB

from slmops.cluster.memory import MemoryCluster, key_of
from slmops.cluster.port import Key
from slmops.reconcile.driver import Driver
from slmops.reconcile.pods import LATE_SECONDS
from slmops.reconcile.table import reconcilers
from slmops.settings import Settings


class Deaf(MemoryCluster):
    """Nobody may ask for Events here."""

    def events(self, namespace: str, *, kind: str, name: str) -> list[Object]:
        raise AssertionError(f"asked for the Events of {kind} {namespace}/{name}")


def test_events_are_read_only_where_the_pod_says_nothing_itself() -> None:
    """They are kept in no cache: a thousand pods that wait for a node would have all of them read a thousand times."""
    obj = finetune()
    late = pod(obj, age=3600, phase="Pending")
    unschedulable = condition("PodScheduled", "Unschedulable", "0/3 nodes are available", "False")
    late["status"]["conditions"] = [unschedulable]
    cluster = Deaf()
    for one in (obj, job(obj, age=3600), late):
        cluster.put(one)
    Driver(cluster, Settings(), reconcilers(), lambda _: None, clock=lambda: NOW).run(key_of(obj))
    found = cluster.get(key_of(obj))
    assert found is not None
    assert (of(found, "Ready") or {})["reason"] == "Unschedulable"
    cluster.set_status(key_of(late), {**late["status"], "conditions": []})
    with pytest.raises(AssertionError, match="Events of Pod"):
        Driver(cluster, Settings(), reconcilers(), lambda _: None, clock=lambda: NOW).run(key_of(obj))


def test_a_job_that_waits_in_a_queue_has_no_events_worth_reading() -> None:
    obj = finetune(queueName="gpus")
    cluster = Deaf()
    for one in (obj, job(obj, age=3600, spec={"suspend": True})):
        cluster.put(one)
    driver = Driver(cluster, Settings(), reconcilers(), lambda _: None, clock=lambda: NOW)
    driver.run(key_of(obj))
    found = cluster.get(key_of(obj))
    assert found is not None
    assert (of(found, "Ready") or {})["reason"] == "Queued"
    cluster.put(job(obj, age=3600))
    with pytest.raises(AssertionError, match="Events of Job"):
        driver.run(key_of(obj))


def refusal(seconds: float) -> Object:
    """What the Job's controller says when a quota refuses the pod."""
    said = 'Error creating: pods "x" is forbidden: exceeded quota: team'
    return {"reason": "FailedCreate", "lastTimestamp": at(seconds), "involvedObject": {"uid": "job-1"}, "message": said}


def evicted(obj: Object, end: float) -> Object:
    """A pod that was taken off its node."""
    found = pod(obj, age=3600, phase="Failed", reason="Evicted", message="The node was low on memory.")
    found["status"]["conditions"] = [{**condition("DisruptionTarget"), "lastTransitionTime": at(end)}]
    return found


def test_a_refusal_of_the_pod_that_is_to_follow_another_one_is_told() -> None:
    """A quota that was cut while the run went on: the pod that was evicted stays, and no other one comes."""
    obj = finetune()
    cluster = MemoryCluster()
    for one in (obj, job(obj, age=3601), evicted(obj, -120)):
        cluster.put(one)
    driver = Driver(cluster, Settings(), reconcilers(lambda _: None), lambda _: None, clock=lambda: NOW)

    def reason() -> str:
        driver.run(key_of(obj))
        return str((of(cluster.objects[key_of(obj)], "Ready") or {})["reason"])

    cluster.add_event(Key("Job", "ns", "tune-finetune"), refusal(-3600))  # the first pod came after it
    assert reason() == "Retrying"
    cluster.add_event(Key("Job", "ns", "tune-finetune"), refusal(-5))
    assert reason() == "QuotaExceeded"
    assert [event for _, event, _ in cluster.posted] == ["AttemptFailed", "QuotaExceeded"]
    cluster.put(pod(obj, name="tune-def", age=1, state=RUNNING))
    assert reason() == "Running"


@pytest.mark.parametrize(
    ("end", "jobs", "phase", "read"),
    [
        (LATE_SECONDS + 1, {}, "Failed", True),
        (LATE_SECONDS, {}, "Failed", False),
        (LATE_SECONDS + 1, {}, "Running", False),  # a sidecar runs: no other pod may follow yet
        (LATE_SECONDS + 1, {"spec": {"suspend": True}}, "Failed", False),
        (LATE_SECONDS + 1, FAILED_JOB, "Failed", False),
    ],
)
def test_events_of_a_job_are_read_only_where_its_next_pod_is_late(
    end: float, jobs: dict[str, Any], phase: str, read: bool
) -> None:
    obj = finetune()
    before = pod(obj, age=3600, phase=phase, state={"terminated": {"exitCode": 1, "finishedAt": at(-end)}})
    cluster = Deaf()
    for one in (obj, job(obj, age=3600, **jobs), before):
        cluster.put(one)
    driver = Driver(cluster, Settings(), reconcilers(), lambda _: None, clock=lambda: NOW)
    with pytest.raises(AssertionError, match="Events of Job") if read else contextlib.nullcontext():
        driver.run(key_of(obj))


@pytest.mark.parametrize(("jobs", "read"), [({}, True), (FAILED_JOB, False)])
def test_the_first_pod_of_a_job_is_missed_at_once(jobs: dict[str, Any], read: bool) -> None:
    obj = finetune()
    cluster = Deaf()
    for one in (obj, job(obj, age=1, **jobs)):
        cluster.put(one)
    driver = Driver(cluster, Settings(), reconcilers(), lambda _: None, clock=lambda: NOW)
    with pytest.raises(AssertionError, match="Events of Job") if read else contextlib.nullcontext():
        driver.run(key_of(obj))
