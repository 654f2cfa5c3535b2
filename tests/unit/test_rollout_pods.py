"""What the pods of a ModelDeployment say of themselves, and what Events tell of those that cannot speak yet."""

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.objects import NOW
from tests.unit.serving_world import KEY, Kubernetes, uri

from slmops.api.times import stamp
from slmops.cluster.port import ClusterError, Objects
from slmops.reconcile.deployment_pods import EVENTS_SECONDS
from slmops.reconcile.pods import LATE_SECONDS
from slmops.reconcile.serverpods import LATELY, ended_lately, fell, is_ready, mute, problem_of


def pod(*, ready: bool = False, init: Any = None, server: Any = None, **status: Any) -> Any:
    words = [{"type": "Ready", "status": "True" if ready else "False"}, *status.pop("conditions", [])]
    return {
        "metadata": {"name": "p", "namespace": "ns"},
        "status": {
            "conditions": words,
            "initContainerStatuses": [{"name": "pull", "image": "server:1", **init}] if init else [],
            "containerStatuses": [{"name": "server", "image": "server:1", **server}] if server else [],
            **status,
        },
    }


def waiting(reason: str, message: str = "") -> Any:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def died(code: int, reason: str = "Error", message: str = "") -> Any:
    return {
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": code, "reason": reason, "message": message}},
    }


DONE = {"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}
NOWHERE = pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 free"}])


@pytest.mark.parametrize(
    ("found", "reason", "words"),
    [
        (pod(init=waiting("ImagePullBackOff", "not found")), "ImagePullFailed", "server:1 cannot be pulled: not found"),
        (pod(init=died(3, message='{"reason": "AccessDenied", "message": "Wrong key."}')), "AccessDenied", "Wrong"),
        # Named as the same failure of a run is, so that docs/errors.md has a row for it.
        (pod(init=died(3, message='{"reason": "BadUri", "message": "Not one."}')), "BadSpec", "Not one"),
        (pod(server=died(137, "OOMKilled")), "OutOfMemory", "limits.memory"),
        (pod(server=died(2, message="usage:\nerror: no --such-flag\n")), "CrashLoopBackOff", "exit code 2: error: no"),
        (pod(server=died(255, "Unknown")), "NodeFailed", "node"),
        (pod(server=died(255)), "CrashLoopBackOff", "exit code 255"),
        (pod(server=died(0, "Completed")), "CrashLoopBackOff", "exit code 0"),
        (
            pod(init=DONE, server={**died(0), "state": {"running": {}}}),
            "CrashLoopBackOff",
            "server ends with exit code 0",
        ),
        (pod(init=DONE, server=DONE), "CrashLoopBackOff", "Container server ends with exit code 0"),
        (pod(server=waiting("CreateContainerConfigError", 'secret "x"')), "CreateContainerConfigError", 'secret "x"'),
        (NOWHERE, "Unschedulable", "0/1"),
    ],
)
def test_pods_say_why_they_are_not_ready(found, reason, words):
    problem = problem_of({}, [pod(ready=True), found])
    assert problem is not None
    assert problem.reason == reason
    assert words in problem.message


def test_pods_that_just_start_have_no_problem():
    assert problem_of({}, [pod(init=waiting("PodInitializing")), pod(server={"state": {"running": {}}})]) is None
    assert problem_of({}, [pod(init=DONE, server=waiting("PodInitializing"))]) is None
    assert problem_of({}, [pod(ready=True, server=died(1))]) is None
    leaving = pod(server=died(1))
    leaving["metadata"]["deletionTimestamp"] = "now"
    assert problem_of({}, [leaving]) is None
    assert not is_ready({**pod(ready=True), "metadata": {"deletionTimestamp": "now"}})


def refused(message):
    return {"status": {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": message}]}}


@pytest.mark.parametrize(
    ("message", "reason"), [("exceeded quota: a", "QuotaExceeded"), ("images must be signed", "PodsForbidden")]
)
def test_what_forbids_pods_is_named(message, reason):
    problem = problem_of(refused(message), [NOWHERE])
    assert problem is not None
    assert (problem.reason, message in problem.message) == (reason, True)


@pytest.mark.parametrize("others", [[NOWHERE], [NOWHERE, NOWHERE], []])
def test_that_a_pod_breaks_is_not_hidden_by_those_that_have_no_room(others):
    for pods in ([pod(server=died(1)), *others], [*others, pod(server=died(1))]):
        problem = problem_of(refused("exceeded quota: a"), pods)
        assert problem is not None
        assert problem.reason == "CrashLoopBackOff"


UP = {"state": {"running": {}}, "started": True, "ready": True}
NOT_ANSWERING = {**UP, "ready": False}  # its engine has died and is started again
STARTING = {**NOT_ANSWERING, "started": False}


@pytest.mark.parametrize(
    ("found", "own"),
    [
        (pod(server=NOT_ANSWERING), True),
        (pod(server=died(1)), True),
        (pod(server=died(0, "Completed")), True),
        (pod(server=died(137, "OOMKilled")), True),
        (pod(server={**STARTING, **died(1), "state": {"running": {}}}), True),
        (pod(server=died(255, "Unknown")), False),  # its node was started anew
        (pod(server=UP), False),  # its node is gone: the pod is not ready, and nobody asks its containers
        (pod(server={**UP, "lastState": died(1)["lastState"]}), False),
        (pod(server=STARTING), False),
        (pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 free"}]), False),
        (pod(init=waiting("ImagePullBackOff"), server=waiting("PodInitializing")), False),
    ],
)
def test_a_pod_falls_by_its_own_doing_or_is_taken(found, own):
    assert fell([found], stamp(NOW)) == own
    assert not fell([aged(ended(found), stamp(NOW))], stamp(NOW))
    assert not fell([{**found, "metadata": {"deletionTimestamp": "now"}}], stamp(NOW))


def test_a_candidate_whose_pods_fall_is_given_up_and_one_whose_pods_are_taken_is_not():
    for state, phase in ((NOT_ANSWERING, "RolledBack"), (STARTING, "Canary")):
        world = Kubernetes(rollout={"steps": [{"weight": 50, "pauseSeconds": 3600}]})
        world.passes()
        world.edit(model=uri("b"))
        world.passes()
        name = world.status["candidate"]["revision"]
        for _ in range(4):
            assert world.status["weight"] == 50
            world.broken[name] = {"containerStatuses": [{"name": "server", **state}]}
            world.passes()
            world.broken.clear()
            world.passes()
        assert world.status["phase"] == phase


def ended(found: Any, phase: str = "Failed") -> Any:
    return {**found, "status": {**found["status"], "phase": phase}}


def test_a_pod_that_ended_does_not_speak_for_those_that_live():
    """An evicted pod is kept as a record, and a preempted one may have ended with any code."""
    old = ended(pod(server=died(137)))
    assert problem_of({}, [old, pod(server={"state": {"running": {}}})]) is None
    assert problem_of({}, [old, ended(pod(ready=True), "Succeeded"), pod(ready=True)]) is None
    assert problem_of({}, [ended(pod(server=DONE), "Succeeded")]) is None  # its node was shut down
    stuck = problem_of({}, [old, pod(server=waiting("CreateContainerConfigError", 'secret "x"'))])
    assert stuck is not None
    assert stuck.reason == "CreateContainerConfigError"
    alone = problem_of({}, [old])
    assert alone is not None
    assert alone.reason == "CrashLoopBackOff"


def test_a_claim_that_is_not_there_is_named():
    text = '0/1 nodes are available: persistentvolumeclaim "models" not found.'
    found = problem_of({}, [pod(conditions=[{"type": "PodScheduled", "status": "False", "message": text}])])
    assert found is not None
    assert found.reason == "ClaimNotFound"
    assert '"models"' in found.message
    assert "create it" in found.message


FULL = {"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "}
REFUSED = {"reason": "UnexpectedAdmissionError", "message": "Allocate failed: no healthy devices"}


@pytest.mark.parametrize(
    ("status", "reason", "words"),
    [(FULL, "DiskFull", "limits.ephemeral-storage"), (REFUSED, "NodeRefused", "no healthy devices")],
)
def test_what_a_node_did_to_the_last_pod_is_told_while_the_next_one_says_nothing(status: Any, reason: str, words: str):
    """A model that is larger than the pod's disk limit is pulled, evicted, and pulled again."""
    over = aged(ended(pod(**status)), stamp(NOW))
    found = ended_lately([over, pod(init={"state": {"running": {}}})], NOW + timedelta(minutes=5))
    assert found is not None
    assert found.reason == reason
    assert words in found.message
    assert ended_lately([over], NOW + LATELY) is None
    assert ended_lately([aged(ended(pod(server=died(1))), stamp(NOW))], NOW) is None  # no node's doing


def test_a_pod_falls_that_writes_more_than_it_may_once():
    over = aged(ended(pod(**FULL)), stamp(NOW))
    assert fell([over, pod(server=STARTING)], stamp(NOW))
    assert not fell([over], stamp(NOW + timedelta(seconds=1)))  # it is kept as a record for long
    assert not fell([over], None)
    assert not fell([aged(ended(pod(**REFUSED)), stamp(NOW))], stamp(NOW))


def test_a_candidate_that_again_and_again_writes_more_than_it_may_is_given_up():
    world = Kubernetes(rollout={"steps": [{"weight": 50, "pauseSeconds": 3600}]})
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    name = world.status["candidate"]["revision"]
    for losses in range(1, 5):
        assert world.status["weight"] == 50
        world.now += timedelta(seconds=60)
        since = [{"type": "Ready", "status": "False", "lastTransitionTime": stamp(world.now)}]
        world.broken[name] = {"phase": "Failed", "conditions": since, **FULL}
        world.passes()
        assert world.status["rollout"]["losses"] == losses
        world.broken.clear()
        world.passes(seconds=60)
    assert world.status["phase"] == "RolledBack"
    assert "DiskFull" in world.status["rollout"]["outcome"]


def aged(found: Any, created: str) -> Any:
    return {**found, "metadata": {**found["metadata"], "creationTimestamp": created}}


def test_who_says_nothing_is_the_oldest_before_its_first_container():
    old, new = "2026-05-01T11:00:00Z", "2026-05-01T12:00:00Z"
    first = aged(pod(init=waiting("PodInitializing")), old)
    second = aged(pod(), new)
    assert mute([second, first]) == first
    assert mute([aged(pod(init={"state": {"running": {}}}, server=waiting("PodInitializing")), old)]) is None
    assert mute([ended(first)]) is None  # scaled to zero, it would be asked for ever
    assert mute([aged(pod(init=waiting("ImagePullBackOff")), old), aged(pod(ready=True), old)]) is None


# Events, by whole passes.

MESSAGE = "Multi-Attach error for volume pvc-1: it is used by another node."


def hanging(*reasons: str, age: float = LATE_SECONDS) -> Kubernetes:
    """The pods of the first revision have a node, and no container; their Events have these reasons."""
    world = Kubernetes()
    world.driver().run(KEY)
    (revision,) = world.deployments()
    world.broken[revision] = {"phase": "Pending"}
    world.kubelet()
    for key in [key for key in world.cluster.objects if key.kind == "Pod" and revision in key.name]:
        metadata = world.cluster.objects[key]["metadata"]
        metadata["creationTimestamp"] = stamp(world.now - timedelta(seconds=age))
        for reason in reasons:
            about = {"uid": metadata["uid"]}
            world.cluster.add_event(key, {"reason": reason, "message": MESSAGE, "involvedObject": about})
    return world


@pytest.mark.parametrize("reason", ["FailedAttachVolume", "FailedMount", "FailedCreatePodSandBox"])
def test_a_pod_that_hangs_before_its_containers_is_told_of_by_its_events(reason: str):
    world = hanging("Scheduled", reason)
    assert world.passes(2) == EVENTS_SECONDS  # no event of the watches will tell
    assert world.condition("Ready")[:2] == ("False", reason)
    assert MESSAGE in world.condition("Ready")[2]
    world.broken.clear()
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")


def test_what_its_events_tell_of_a_pod_is_not_hidden_by_one_that_has_no_room():
    world = hanging("Scheduled", "FailedMount")
    (revision,) = world.deployments()
    world.broken = {f"{revision}/0": NOWHERE["status"], f"{revision}/1": {"phase": "Pending"}}
    world.passes(2)
    assert world.condition("Ready")[:2] == ("False", "FailedMount")
    world.broken[f"{revision}/1"] = NOWHERE["status"]
    world.passes(2)
    assert world.condition("Ready")[:2] == ("False", "Unschedulable")


@pytest.mark.parametrize("reasons", [("Scheduled",), ("Scheduled", "FailedMount", "Pulling"), ()])
def test_a_pod_that_got_on_has_no_problem(reasons: tuple[str, ...]):
    world = hanging(*reasons)
    world.passes(2)
    assert MESSAGE not in str(world.status)


def test_a_pod_that_has_just_been_made_is_not_asked_yet():
    world = hanging("Scheduled", "FailedMount", age=LATE_SECONDS - 1)
    world.passes(2)
    assert MESSAGE not in str(world.status)
    world.passes(1, seconds=2)
    assert world.condition("Ready")[1] == "FailedMount"


def test_an_evicted_pod_is_told_of_by_the_pass():
    world = Kubernetes()
    world.passes()
    revision = world.status["stable"]["revision"]
    world.broken[revision] = {"phase": "Failed", **FULL}
    for key, found in world.cluster.objects.items():
        if key.kind == "Pod" and revision in key.name:
            found["metadata"]["creationTimestamp"] = stamp(world.now)
    world.passes()
    assert world.condition("Ready")[:2] == ("False", "DiskFull")


def test_events_are_read_once_in_a_while_however_often_passes_come(monkeypatch: pytest.MonkeyPatch):
    world = hanging("Scheduled", "FailedMount")
    asked: list[str] = []
    read = world.cluster.events

    def events(namespace: str, *, kind: str, name: str) -> Objects:
        asked.append(name)
        return read(namespace, kind=kind, name=name)

    monkeypatch.setattr(world.cluster, "events", events)
    driver = world.driver()

    def run(seconds: float) -> str:
        world.now += timedelta(seconds=seconds)
        driver.run(KEY)
        return world.condition("Ready")[1]

    assert [run(2) for _ in range(5)] == ["FailedMount"] * 5
    assert len(asked) == 1
    assert run(EVENTS_SECONDS) == "FailedMount"
    assert len(asked) == 2


def test_events_that_may_not_be_read_stop_no_pass(monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: Any, **__: Any) -> Objects:
        raise ClusterError(403, "Forbidden", "events is forbidden")

    world = hanging("Scheduled", "FailedMount")
    monkeypatch.setattr(world.cluster, "events", forbidden)
    world.passes()
    world.broken.clear()
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")
