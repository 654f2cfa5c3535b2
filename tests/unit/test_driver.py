"""The driver's wiring, on the cluster in memory: order, outcomes, foreign objects, what is written."""

import math
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError
from tests.unit.objects import ARTIFACT, NOW, RUNNING, at, finetune, of, ours, pod, said, succeeded, waiting

from slmops.api.finetune import FineTuneJobSpec
from slmops.api.meta import Progress
from slmops.cluster.memory import MemoryCluster, key_of
from slmops.cluster.port import ClusterError, Key, Object
from slmops.handlers.known import Known, note_of
from slmops.reconcile.driver import Driver
from slmops.reconcile.protocol import World
from slmops.reconcile.state import Event, Plan, Retry, Routes, Terminal
from slmops.reconcile.table import reconcilers
from slmops.remote.errors import RemoteError
from slmops.settings import Settings

CHILD = {"apiVersion": "v1", "kind": "Service", "spec": {}, "metadata": {"name": "c", "namespace": "ns"}}


class Scripted:
    """A reconciler that does what the test says."""

    kind = "FineTuneJob"

    def __init__(self, plan: Plan | Exception) -> None:
        self.plan = plan

    def observe(self, obj: Object, world: World) -> object:
        assert world.now == NOW
        return None

    def decide(self, obj: Object, observed: object, now: datetime) -> Plan:
        if isinstance(self.plan, Exception):
            raise self.plan
        return self.plan

    def references(self, obj: Object) -> frozenset[tuple[str, str]]:
        return frozenset()


def setting(plan: Plan | Exception, push: Any = None) -> tuple[MemoryCluster, Driver, Key]:
    cluster = MemoryCluster()
    obj = cluster.put(finetune())
    driver = Driver(
        cluster, Settings(), {"FineTuneJob": Scripted(plan)}, push or (lambda routes: None), clock=lambda: NOW
    )
    return cluster, driver, key_of(obj)


def owned(cluster: MemoryCluster, key: Key) -> Object:
    uid = cluster.objects[key]["metadata"]["uid"]
    metadata = {**CHILD["metadata"], "ownerReferences": [{"kind": key.kind, "name": key.name, "uid": uid}]}  # type: ignore[dict-item]
    return {**CHILD, "metadata": metadata}


def test_children_routes_status_events_in_this_order() -> None:
    done: list[str] = []

    def push(routes: Routes) -> None:
        done.extend([*(verb for verb, _ in cluster.writes), "routes"])

    plan = Plan(
        status={"phase": "X"}, apply=(CHILD,), routes=(Routes("http://r", {"a": 100}),), events=(Event("Did", "it"),)
    )
    cluster, driver, key = setting(replace(plan, requeue=7.0), push)
    assert driver.run(key) == 7.0
    assert done == ["apply", "routes"]
    assert [verb for verb, _ in cluster.writes] == ["apply", "patch_status"]
    assert cluster.posted == [(key, "Did", "it")]


def test_what_is_given_up_is_said_before_the_routers_hear_of_it() -> None:
    done: list[str] = []

    def push(routes: Routes) -> None:
        done.extend([*(verb for verb, _ in cluster.writes), "routes"])

    plan = Plan(status={"phase": "X"}, routes=(Routes("http://r", {"a": 100}),), events=(Event("Did", "it"),))
    plan = replace(plan, apply=(CHILD,), keep_going=True, status_first=True)
    cluster, driver, key = setting(plan, push)
    driver.run(key)
    assert done == ["patch_status", "apply", "routes"]
    assert [verb for verb, _ in cluster.writes] == ["patch_status", "apply"]
    assert cluster.posted == [(key, "Did", "it")]


def test_what_is_given_up_reaches_the_routers_though_no_status_can_be_written_before() -> None:
    done: list[str] = []
    plan = Plan(status={"phase": "X"}, routes=(Routes("http://r", {"a": 100}),), keep_going=True, status_first=True)
    cluster, driver, key = setting(plan, lambda routes: done.append(routes.url))
    cluster.refuse["FineTuneJob"] = ClusterError(500, "InternalError", "no space")  # once
    driver.run(key)
    assert done == ["http://r"]
    assert cluster.objects[key]["status"]["phase"] == "X"


def test_a_second_pass_writes_nothing() -> None:
    cluster, driver, key = setting(Plan(status={"phase": "X"}))
    child = owned(cluster, key)
    driver = replace(driver, reconcilers={"FineTuneJob": Scripted(Plan(status={"phase": "X"}, apply=(child,)))})
    driver.run(key)
    before = list(cluster.writes)
    assert len(before) == 2
    driver.run(key)
    assert cluster.writes == before


def test_an_object_that_is_gone_or_going_is_left_alone() -> None:
    cluster, driver, key = setting(AssertionError("no pass"))
    assert driver.run(Key("FineTuneJob", "ns", "other")) == math.inf
    cluster.objects[key]["metadata"]["deletionTimestamp"] = "2026-05-01T00:00:00Z"
    assert driver.run(key) == math.inf
    assert cluster.writes == []


def test_retry_says_so_and_comes_again() -> None:
    cluster, driver, key = setting(Retry("SecretNotFound", "Secret s does not exist.", after=10))
    assert driver.run(key) == 10
    obj = cluster.objects[key]
    assert obj["status"]["observedGeneration"] == 1
    ready, going = of(obj, "Ready"), of(obj, "Reconciling")
    assert ready is not None
    assert going is not None
    assert (ready["status"], ready["reason"], going["status"]) == ("False", "SecretNotFound", "True")
    writes = len(cluster.writes)
    driver.run(key)
    assert len(cluster.writes) == writes


def test_terminal_is_told_once() -> None:
    cluster, driver, key = setting(Terminal("NoStore", "Give spec.output."))
    for _ in range(2):
        assert driver.run(key) is None
    obj = cluster.objects[key]
    stalled = of(obj, "Stalled")
    assert stalled is not None
    assert (stalled["status"], obj["status"]["phase"]) == ("True", "Failed")
    assert of(obj, "Reconciling") is None
    assert cluster.posted == [(key, "NoStore", "Give spec.output.")]
    assert len(cluster.writes) == 1


def test_a_router_that_does_not_answer_keeps_the_status() -> None:
    def push(routes: Routes) -> None:
        raise RemoteError("connection refused")

    plan = Plan(status={"phase": "Promoted"}, routes=(Routes("u", {}),), events=(Event("Promoted", ""),))
    cluster, driver, key = setting(plan, push)
    assert driver.run(key) == 5.0
    assert cluster.objects[key]["status"].get("phase") != "Promoted"
    assert cluster.posted == []


KYVERNO = ClusterError(400, "", 'admission webhook "validate.kyverno.svc" denied the request: label team is missing')
GATEKEEPER = ClusterError(403, "Forbidden", 'admission webhook "validation.gatekeeper.sh" denied the request: [team] x')
POLICY = ClusterError(
    422, "Invalid", "jobs.batch \"j\" is forbidden: ValidatingAdmissionPolicy 'a' with binding 'b' denied request: no"
)

REFUSED = [
    (KYVERNO, "Reconciling", "PolicyDenied"),
    (GATEKEEPER, "Reconciling", "PolicyDenied"),
    (POLICY, "Reconciling", "PolicyDenied"),
    (ClusterError(403, "Forbidden", "exceeded quota: q"), "Reconciling", "QuotaExceeded"),
    (ClusterError(403, "Forbidden", "cannot create"), "Reconciling", "Forbidden"),
    (ClusterError(403, "Forbidden", "namespace ns is being terminated"), "Reconciling", "NamespaceTerminating"),
    (ClusterError(422, "Invalid", "spec.x: bad"), "Stalled", "Rejected"),
    (ClusterError(413, "RequestEntityTooLarge", "limit is 3145728"), "Stalled", "TooLarge"),
    (ClusterError(500, "InternalError", "etcdserver: request is too large"), "Stalled", "TooLarge"),
    (ClusterError(500, "InternalError", 'failed calling webhook "x": timeout'), "Reconciling", "WebhookFailed"),
    (ClusterError(500, "InternalError", "etcdserver: leader changed"), "Reconciling", "ApiServerError"),
]


@pytest.mark.parametrize(("error", "condition", "reason"), REFUSED)
def test_a_refused_child_is_explained(error: ClusterError, condition: str, reason: str) -> None:
    cluster, driver, key = setting(Plan(status={"phase": "X"}, apply=(CHILD,)))
    cluster.refuse["Service"] = error
    driver.run(key)
    found = of(cluster.objects[key], condition)
    assert found is not None
    assert found["reason"] == reason
    assert cluster.objects[key]["status"].get("phase") != "X"


@pytest.mark.parametrize("error", [KYVERNO, GATEKEEPER, POLICY], ids=["kyverno", "gatekeeper", "policy"])
def test_a_policy_that_keeps_what_should_go_is_told_of(error: ClusterError) -> None:
    cluster, driver, key = setting(Plan(status={"phase": "X"}, delete=(Key("Service", "ns", "c"),)))
    cluster.put(owned(cluster, key))
    cluster.refuse["Service"] = error
    assert driver.run(key) == 15.0
    assert reason(cluster, cluster.objects[key]) == "PolicyDenied"


def test_a_policy_that_refuses_the_status_leaves_it_as_it_is_for_now() -> None:
    cluster, driver, key = setting(Plan(status={"phase": "X"}))
    cluster.refuse["FineTuneJob"] = KYVERNO
    with pytest.raises(ClusterError):
        driver.run(key)
    assert cluster.posted == []


@pytest.mark.parametrize("status", [0, 409, 429, 503, 504])
def test_an_ill_api_server_goes_up_to_the_queue(status: int) -> None:
    cluster, driver, key = setting(Plan(status={"phase": "X"}, apply=(CHILD,)))
    cluster.refuse["Service"] = ClusterError(status, "", "")
    with pytest.raises(ClusterError):
        driver.run(key)
    assert cluster.writes == []


def test_a_foreign_object_of_the_childs_name_is_not_touched() -> None:
    cluster, driver, key = setting(Plan(status={"phase": "X"}, apply=(CHILD,), delete=(Key("Service", "ns", "c"),)))
    cluster.put({**CHILD, "spec": {"mine": True}})
    assert driver.run(key) == 30.0
    assert cluster.objects[Key("Service", "ns", "c")]["spec"] == {"mine": True}
    ready = of(cluster.objects[key], "Ready")
    assert ready is not None
    assert ready["reason"] == "NameConflict"


@pytest.mark.parametrize("verb", ["apply", "delete"])
@pytest.mark.parametrize("keep_going", [True, False])
def test_no_plan_reaches_into_another_namespace(verb: str, keep_going: bool) -> None:
    away: Object = {**CHILD, "metadata": {"name": "c", "namespace": "kube-system"}}
    acts = {"apply": (away,)} if verb == "apply" else {"delete": (key_of(away),)}
    cluster, driver, _ = setting(Plan(status={"phase": "X"}, keep_going=keep_going, **acts))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="another namespace"):
        driver.run(key_of(finetune()))
    assert cluster.writes == []


def test_a_child_of_a_deleted_namesake_is_waited_for() -> None:
    cluster, driver, key = setting(Plan(status={}, apply=(CHILD,)))
    child = owned(cluster, key)
    child["metadata"]["ownerReferences"][0]["uid"] = "former"
    cluster.put(child)
    assert driver.run(key) == 5.0
    ready = of(cluster.objects[key], "Ready")
    assert ready is not None
    assert ready["reason"] == "ChildTerminating"


def test_an_object_of_an_older_schema_is_explained() -> None:
    try:
        FineTuneJobSpec.model_validate({"base": {}})
    except ValidationError as error:
        cluster, driver, key = setting(error)
    assert driver.run(key) is None
    stalled = of(cluster.objects[key], "Stalled")
    assert stalled is not None
    assert stalled["reason"] == "InvalidSpec"
    assert "dataset" in stalled["message"]


def test_a_status_that_does_not_fit_is_told_and_no_endless_error() -> None:
    cluster, driver, key = setting(Plan(status={"phase": "X"}))
    cluster.refuse["FineTuneJob"] = ClusterError(422, "Invalid", "status.artifact.sizeBytes: Invalid value")
    assert driver.run(key) is None
    stalled = of(cluster.objects[key], "Stalled")
    assert stalled is not None
    assert "sizeBytes" in stalled["message"]
    assert [reason for _, reason, _ in cluster.posted] == ["InternalError"]


def of_a_suspended_run(*, suspend: bool, trouble: Exception) -> Object:
    """What the object looks like after a pass with this trouble."""
    cluster, driver, key = setting(trouble)  # type: ignore[arg-type]  # the scripted ones are Exceptions
    cluster.put(finetune(suspend=suspend))
    said = {"reason": "Suspended", "message": "", "lastTransitionTime": at(0)}
    words = {"Ready": "False", "Reconciling": "True", "Suspended": "True"}
    conditions = [{**said, "type": kind, "status": word} for kind, word in words.items()]
    cluster.set_status(key, {"conditions": conditions, "phase": "Suspended"})
    driver.run(key)
    return cluster.objects[key]


def test_a_resumed_run_that_cannot_start_is_not_called_suspended() -> None:
    waits = of_a_suspended_run(suspend=False, trouble=Retry("QuotaExceeded", "no room"))
    assert of(waits, "Suspended") is None
    assert (of(waits, "Reconciling") or {})["reason"] == "QuotaExceeded"
    assert waits["status"]["phase"] == "Waiting"
    given_up = of_a_suspended_run(suspend=False, trouble=Terminal("NoStore", "Give spec.output."))
    assert of(given_up, "Suspended") is None
    assert given_up["status"]["phase"] == "Failed"


def test_a_suspended_run_with_trouble_is_still_suspended() -> None:
    waits = of_a_suspended_run(suspend=True, trouble=Retry("Forbidden", "may not delete"))
    assert (of(waits, "Suspended") or {})["status"] == "True"
    assert waits["status"]["phase"] == "Suspended"


def test_what_was_given_up_and_goes_on_has_not_failed() -> None:
    cluster, driver, key = setting(Terminal("NoStore", "Give spec.output."))
    driver.run(key)
    assert cluster.objects[key]["status"]["phase"] == "Failed"
    replace(driver, reconcilers={"FineTuneJob": Scripted(Retry("QuotaExceeded", "no room"))}).run(key)
    assert cluster.objects[key]["status"]["phase"] == "Waiting"


def test_a_new_object_that_must_wait_has_a_phase() -> None:
    cluster, driver, key = setting(Retry("NameConflict", "Job x exists."))
    driver.run(key)
    assert cluster.objects[key]["status"]["phase"] == "Waiting"


@pytest.mark.parametrize("trouble", [ClusterError(403, "Forbidden", "cannot get secrets"), Terminal("NoStore", "x")])
def test_a_failed_run_stays_failed_whatever_hinders_looking_after_it(trouble: Exception) -> None:
    cluster, driver, key = setting(trouble)  # type: ignore[arg-type]  # the scripted ones are Exceptions
    said = {"reason": "BadDataset", "message": "", "lastTransitionTime": at(0)}
    words = {"Ready": "False", "Stalled": "True", "Failed": "True"}
    failed = {"conditions": [{**said, "type": kind, "status": word} for kind, word in words.items()], "phase": "Failed"}
    cluster.set_status(key, failed)
    driver.run(key)
    assert cluster.objects[key]["status"] == failed
    assert cluster.posted == []


def test_the_end_of_a_run_is_told_once_and_with_its_length() -> None:
    told: list[tuple[str, str, float]] = []
    ended = {"phase": "Failed", "startTime": at(-90), "completionTime": at(-5)}
    cluster, driver, key = setting(Plan(status=ended))
    driver = replace(driver, on_end=lambda *what: told.append(what))
    driver.run(key)
    driver.run(key)
    assert told == [("FineTuneJob", "Failed", 85.0)]
    again = replace(driver)  # another process: the status is all it knows
    again.run(key)
    assert len(told) == 1
    never_began = replace(driver, reconcilers={"FineTuneJob": Scripted(Plan(status={"phase": "Succeeded"}))})
    cluster.set_status(key, {})
    never_began.run(key)
    assert len(told) == 1
    looked_at_again = {"phase": "Failed", "startTime": at(-90)}
    cluster.set_status(key, looked_at_again)
    replace(driver, reconcilers={"FineTuneJob": Scripted(Plan(status=looked_at_again))}).run(key)
    assert len(told) == 1
    driver.run(key)
    assert len(told) == 2


def test_what_was_reached_is_not_taken_back() -> None:
    cluster, driver, key = setting(ClusterError(403, "Forbidden", "cannot get jobs"))
    assert driver.run(key) == 15.0
    ready = of(cluster.objects[key], "Ready")
    assert ready is not None
    assert (ready["reason"], ready["status"]) == ("Forbidden", "False")
    said = {"status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": at(0)}
    done = {"conditions": [{**said, "type": kind} for kind in ("Ready", "Complete")], "observedGeneration": 1}
    cluster.set_status(key, done)
    assert driver.run(key) == 15.0
    assert cluster.objects[key]["status"] == done
    given_up = replace(driver, reconcilers={"FineTuneJob": Scripted(Terminal("InvalidSpec", "x"))})
    assert given_up.run(key) is None
    assert cluster.objects[key]["status"] == done


def test_a_foreign_job_of_the_name_does_not_trouble_a_finished_object() -> None:
    cluster = MemoryCluster()
    key = key_of(cluster.put(finetune()))
    said = {"status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": at(0)}
    done = {
        "conditions": [{**said, "type": kind} for kind in ("Ready", "Complete")],
        "artifact": ARTIFACT,
        "observedGeneration": 1,
    }
    cluster.set_status(key, done)
    cluster.put({"kind": "Job", "metadata": {"name": "tune-finetune", "namespace": "ns"}, "spec": {}})
    driver = Driver(cluster, Settings(store="oci://s"), reconcilers(lambda address: None), lambda routes: None)
    driver.run(key)
    assert cluster.objects[key]["status"]["conditions"][0]["status"] == "True"
    assert ("delete", Key("Job", "ns", "tune-finetune")) not in cluster.writes


def test_a_whole_life_with_the_real_reconciler() -> None:
    cluster = MemoryCluster()
    key = key_of(cluster.put(finetune()))
    uid = cluster.objects[key]["metadata"]["uid"]
    driver = Driver(
        cluster, Settings(store="oci://s"), reconcilers(lambda address: None), lambda routes: None, clock=lambda: NOW
    )
    driver.run(key)
    job = Key("Job", "ns", "tune-finetune")
    assert cluster.objects[job]["metadata"]["ownerReferences"][0]["uid"] == uid
    worker = pod(cluster.objects[key], phase="Succeeded", state=succeeded(), of=cluster.objects[job]["metadata"]["uid"])
    cluster.put(worker)
    cluster.set_status(key_of(worker), worker["status"])
    driver.run(key)
    assert cluster.objects[key]["status"]["phase"] == "Succeeded"
    assert [verb for verb, _ in cluster.writes] == ["apply", "patch_status", "patch_status"]
    cluster.delete(job)
    driver.run(key)
    assert job not in cluster.objects
    cluster.delete(key)
    assert driver.run(key) == math.inf
    assert cluster.objects == {} or all(found.kind == "Pod" for found in cluster.objects)


CHANGES = [({"backoffLimit": 9}, "Running", 60), ({"suspend": True}, "Suspended", 20)]


@pytest.mark.parametrize(("change", "then", "percent"), CHANGES)
def test_a_run_whose_change_a_policy_refuses_runs_on_and_says_so(change: Object, then: str, percent: int) -> None:
    cluster, moment, told = MemoryCluster(), NOW, 20

    def progress(address: str) -> Progress:
        return Progress(percent=told, stage="Training")

    driver = Driver(
        cluster, Settings(store="oci://s"), reconcilers(progress), lambda routes: None, clock=lambda: moment
    )
    key, job = key_of(cluster.put(finetune())), Key("Job", "ns", "tune-finetune")
    driver.run(key)
    worker = pod(cluster.objects[key], state=RUNNING, of=cluster.objects[job]["metadata"]["uid"])
    cluster.put(worker)
    cluster.set_status(key_of(worker), worker["status"])
    driver.run(key)
    cluster.put(finetune(**change))
    moment, told = NOW + timedelta(seconds=60), 60
    for _ in range(2):
        cluster.refuse["Job"] = KYVERNO
        again = driver.run(key)
        assert again is not None
        assert again <= 15.0
        obj = cluster.objects[key]
        assert (obj["status"]["phase"], obj["status"]["progress"]["percent"]) == ("Running", percent)
        going = of(obj, "Reconciling")
        assert going is not None
        assert going["reason"] == "PolicyDenied"
        assert "label team" in going["message"]
        assert (of(obj, "Stalled"), of(obj, "Suspended")) == (None, None)
    driver.run(key)
    assert cluster.objects[key]["status"]["phase"] == then
    assert change.items() <= cluster.objects[job]["spec"].items()


def test_a_run_whose_change_a_policy_refuses_says_how_its_pods_end_and_why_none_starts() -> None:
    cluster, moment = MemoryCluster(), NOW
    driver = Driver(
        cluster, Settings(store="oci://s"), reconcilers(lambda address: None), lambda routes: None, clock=lambda: moment
    )
    key, job = key_of(cluster.put(finetune())), Key("Job", "ns", "tune-finetune")
    driver.run(key)
    uid = cluster.objects[job]["metadata"]["uid"]

    def look(name: str, age: float, **status: Any) -> tuple[str, list[str]]:
        """What two passes say of this pod, and by which Events."""
        found = pod(cluster.objects[key], name=name, age=age, of=uid, **status)
        cluster.put(found)
        cluster.set_status(key_of(found), found["status"])
        told = len(cluster.posted)
        for _ in range(2):
            cluster.refuse["Job"] = KYVERNO
            driver.run(key)
        ready = of(cluster.objects[key], "Ready")
        assert ready is not None
        assert (ready["reason"], "label team" in ready["message"]) == ("PolicyDenied", True)
        return ready["message"], [event for _, event, _ in cluster.posted[told:]]

    cluster.put(finetune(backoffLimit=9))
    message, events = look("tune-a", 50, state=RUNNING)
    assert (message.partition(". ")[0], events) == ("Pod tune-a runs", [])
    assert look("tune-a", 50, phase="Failed", state=said("Interrupted", "saved up to 100", 143))[1] == ["Interrupted"]
    assert look("tune-b", 30, phase="Failed", state=said("InternalError", "lost", 1))[1] == ["AttemptFailed"]
    assert cluster.objects[key]["status"]["lastFailure"]["reason"] == "InternalError"
    message, events = look("tune-c", 10, phase="Pending", state=waiting("ErrImagePull", "no such tag"))
    assert ("no such tag" in message, events) == (True, ["ImagePullBackOff"])
    moment += timedelta(hours=1)
    cluster.refuse["Job"] = KYVERNO
    assert driver.run(key) == 60.0


def test_a_resumption_that_a_policy_refuses_is_all_that_is_told() -> None:
    """No pod starts."""
    cluster = MemoryCluster()
    driver = Driver(
        cluster, Settings(store="oci://s"), reconcilers(lambda address: None), lambda routes: None, clock=lambda: NOW
    )
    key = key_of(cluster.put(finetune()))
    driver.run(key)
    cluster.put(finetune(suspend=True))
    driver.run(key)
    cluster.put(finetune())
    cluster.refuse["Job"] = KYVERNO
    driver.run(key)
    ready = of(cluster.objects[key], "Ready")
    assert ready is not None
    assert (ready["reason"], "starts" in ready["message"]) == ("PolicyDenied", False)
    assert cluster.objects[key]["status"]["phase"] == "Waiting"


class Counting(MemoryCluster):
    """Counts what is read of our objects."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def get(self, key: Key) -> Object | None:
        self.read += key.kind == "FineTuneJob"
        return super().get(key)


def test_a_pass_that_waits_reads_its_own_source_however_long_the_chain() -> None:
    """Ten, a hundred, a thousand that wait for one another: the last of them reads itself and the one before."""
    cluster, known = Counting(), Known()
    chain = [finetune(name=f"n{number}", base=base(f"n{number - 1}")) for number in range(1000)]
    for number, link in enumerate(chain):
        link["metadata"]["uid"] = f"n{number}"
        known.concerned(note_of({"object": cluster.put(link)}))
    driver = Driver(
        cluster,
        Settings(store="oci://s"),
        reconcilers(lambda address: None),
        lambda routes: None,
        circular=known.circular,
        clock=lambda: NOW,
    )
    for last in (9, 99, 999):
        cluster.read = 0
        driver.run(key_of(chain[last]))
        assert cluster.read == 2
    assert reason(cluster, chain[999]) == "SourceNotReady"
    first = {**chain[0], "spec": {**chain[0]["spec"], "base": base("n2")}}
    known.concerned(note_of({"object": cluster.put(first)}))
    for closing in (0, 1, 2):  # whichever comes first
        driver.run(key_of(chain[closing]))
        assert reason(cluster, chain[closing]) == "SourceCycle"
    driver.run(key_of(chain[3]))
    assert reason(cluster, chain[3]) == "SourceNotReady"


def base(name: str) -> Object:
    return {"ref": {"kind": "FineTuneJob", "name": name}}


def reason(cluster: MemoryCluster, obj: Object) -> str:
    said = cluster.objects[key_of(obj)]["status"]["conditions"]
    return next(str(one["reason"]) for one in said if one["type"] == "Ready")


@pytest.mark.parametrize("trouble", [ClusterError(403, "Forbidden", "cannot list pods"), Terminal("InvalidSpec", "x")])
@pytest.mark.parametrize(("seen", "ready"), [(1, "False"), (2, "True")])
def test_ready_is_not_carried_over_to_a_spec_that_nobody_has_seen(trouble: Exception, seen: int, ready: str) -> None:
    """`kubectl wait` would take the new model as served; what answers, answers on."""
    cluster = MemoryCluster()
    key = key_of(cluster.put(ours("ModelDeployment", {"model": {"uri": "oci://r/m:1"}}, name="chat")))
    cluster.put(ours("ModelDeployment", {"model": {"uri": "oci://r/m:2"}}, name="chat"))
    said = {"status": "True", "reason": "Serving", "message": "", "lastTransitionTime": at(0)}
    stood = [{**said, "type": kind, "observedGeneration": seen} for kind in ("Ready", "Available")]
    cluster.set_status(key, {"conditions": stood, "observedGeneration": seen})
    scripted = Scripted(trouble)  # type: ignore[arg-type]  # the scripted ones are Exceptions
    driver = Driver(cluster, Settings(), {"ModelDeployment": scripted}, lambda routes: None, clock=lambda: NOW)
    for _ in range(2):
        driver.run(key)
        found = cluster.objects[key]
        assert found["status"]["observedGeneration"] == 2
        assert (of(found, "Ready") or {})["status"] == ready
        assert (of(found, "Available") or {})["status"] == "True"


def test_an_artifact_without_its_condition_is_no_finished_run() -> None:
    """So a status may be restored by hand: the run starts, and finds what it wrote."""
    cluster = MemoryCluster()
    key = key_of(cluster.put(finetune()))
    cluster.set_status(key, {"artifact": ARTIFACT, "observedGeneration": 1})
    driver = Driver(
        cluster, Settings(store="oci://s"), reconcilers(lambda address: None), lambda routes: None, clock=lambda: NOW
    )
    driver.run(key)
    job = Key("Job", "ns", "tune-finetune")
    assert job in cluster.objects
    worker = pod(cluster.objects[key], phase="Succeeded", state=succeeded(), of=cluster.objects[job]["metadata"]["uid"])
    cluster.put(worker)
    cluster.set_status(key_of(worker), worker["status"])
    cluster.set_status(job, {"conditions": [{"type": "Complete", "status": "True"}]})
    driver.run(key)
    assert cluster.objects[key]["status"]["phase"] == "Succeeded"
