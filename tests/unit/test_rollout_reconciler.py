"""ModelDeployment through the driver, on the cluster in memory: what is made, kept and removed."""

import json
from datetime import timedelta

import pytest
from tests.unit.objects import Object
from tests.unit.serving_world import CANARY, Kubernetes, source, uri

from slmops.api import keys
from slmops.cluster.port import ClusterError, Key
from slmops.reconcile.deployment import ROUTERS_MOST
from slmops.remote import prometheus


def test_a_served_model_is_ready_and_at_rest():
    world = Kubernetes()
    assert world.passes() is None
    assert world.condition("Ready")[:2] == ("True", "Serving")
    assert world.condition("Available")[0] == "True"
    assert [c["type"] for c in world.status["conditions"]] == ["Ready", "Available"]
    assert world.status["endpoint"] == "http://chat.ns.svc:8000/v1"
    assert world.status["ready"] == "2/2"
    assert world.status["stable"]["digest"] == "sha256:" + "a" * 64
    assert {k.kind for k in world.cluster.objects} == {
        "ModelDeployment", "Deployment", "Pod", "Service", "ConfigMap", "Secret", "PodDisruptionBudget",
    }  # fmt: skip
    world.cluster.writes.clear()
    world.passes()
    assert world.cluster.writes == []


def test_one_replica_has_no_disruption_budget_and_scaling_down_removes_it():
    world = Kubernetes()
    world.passes()
    world.edit(replicas=1)
    world.passes()
    assert not [k for k in world.cluster.objects if k.kind == "PodDisruptionBudget"]
    assert world.cluster.objects[Key("Deployment", "ns", "chat-router")]["spec"]["replicas"] == 1


def protected(world: Kubernetes, role: str) -> set[str]:
    """The pods that the budget of this role counts."""
    budget = world.cluster.objects[Key("PodDisruptionBudget", "ns", f"chat-{role}s")]
    wanted = budget["spec"]["selector"]["matchLabels"].items()
    pods = [key for key in world.cluster.objects if key.kind == "Pod"]
    return {key.name for key in pods if wanted <= world.cluster.objects[key]["metadata"]["labels"].items()}


def test_pods_of_a_candidate_that_start_do_not_stop_the_drain_of_the_stable_ones():
    """All are counted by one budget, and those that are not ready leave nothing to spend."""
    world = Kubernetes(rollout={"steps": [{"weight": 50, "pauseSeconds": 60}]})
    world.passes()
    old = world.status["stable"]["revision"]
    assert protected(world, "server") == {f"chat-{old}-0", f"chat-{old}-1"}
    world.edit(model=uri("b"))
    world.passes()
    new = world.status["candidate"]["revision"]
    assert new in world.deployments()
    assert protected(world, "server") == {f"chat-{old}-0", f"chat-{old}-1"}
    world.passes(seconds=61)
    assert world.status["stable"]["revision"] == new
    assert protected(world, "server") == {f"chat-{new}-0", f"chat-{new}-1"}
    assert protected(world, "router") == {"chat-router-0", "chat-router-1"}


def counted(world: Kubernetes) -> set[str]:
    """The pods that an autoscaler finds by the scale subresource."""
    equal, one_of, among = world.status["selector"].rstrip(")").partition(f",{keys.LABEL_REVISION} in (")
    labels = dict(pair.split("=") for pair in equal.split(",")).items()
    pods = {k.name: v["metadata"]["labels"] for k, v in world.cluster.objects.items() if k.kind == "Pod"}
    found = {name: has for name, has in pods.items() if labels <= has.items()}
    return {name for name, has in found.items() if not one_of or has[keys.LABEL_REVISION] in among.split(",")}


def test_an_autoscaler_counts_the_pods_that_share_the_load_and_no_others():
    """Those of a former revision are idle: with them in the mean, twice the load would be no reason for more pods."""
    world = Kubernetes(rollout={"steps": [{"weight": 50, "pauseSeconds": 60}], "scaleDownDelaySeconds": 3600})
    world.passes()
    old = world.status["stable"]["revision"]
    assert counted(world) == {f"chat-{old}-0", f"chat-{old}-1"}
    world.edit(model=uri("b"))
    world.passes()
    new = world.status["candidate"]["revision"]
    assert counted(world) == {f"chat-{old}-0", f"chat-{old}-1", f"chat-{new}-0"}
    world.passes(seconds=61)
    assert (world.status["stable"]["revision"], set(world.deployments())) == (new, {old, new})
    assert counted(world) == {f"chat-{new}-0", f"chat-{new}-1"}
    world.edit(model=uri("c"))
    world.passes()
    world.annotate(abort="*")
    world.passes()
    assert (world.status["phase"], "candidate" in world.status) == ("RolledBack", True)
    assert counted(world) == {f"chat-{new}-0", f"chat-{new}-1"}


def test_an_autoscaler_counts_the_pods_of_a_first_revision():
    world = Kubernetes()
    world.passes(2)
    only = world.status["candidate"]["revision"]
    assert counted(world) == {f"chat-{only}-0", f"chat-{only}-1"}


def weights(world: Kubernetes, url: str) -> dict[str, int]:
    return {r["revision"]: r["weight"] for r in world.agents[url]["revisions"] if r["weight"]}


def test_a_router_that_drains_gets_new_weights_and_is_waited_for_by_nobody():
    """It answers requests until its end: a candidate that fails must get none of them."""
    world = Kubernetes(rollout=CANARY)
    world.passes()
    old = world.status["stable"]["revision"]
    world.drain_router("fd00::7", until=world.now + timedelta(seconds=60))
    world.edit(model=uri("b"))
    world.passes()
    new, url = world.status["candidate"]["revision"], "http://[fd00::7]:9091"
    assert weights(world, url) == {old: 50, new: 50}
    world.deaf.add(url)  # it has gone meanwhile
    world.edit(model=uri("a"))
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")
    world.deaf.clear()
    world.passes(1)
    assert weights(world, url) == {old: 100}
    world.now += timedelta(seconds=61)
    world.agents.clear()
    world.passes(1)
    assert url not in world.agents  # a node that died leaves its pods behind: they are asked no more


def test_a_pass_asks_no_more_routers_than_there_can_be():
    """Each that lets us wait takes a worker for its time."""
    world = Kubernetes()
    world.passes()
    for number in range(30):
        world.drain_router(f"10.0.1.{number}", world.now + timedelta(seconds=300), number=number + 2)
    world.agents.clear()
    world.passes(1)
    assert len(world.agents) == ROUTERS_MOST
    assert {"http://10.0.0.1:9091", "http://10.0.0.2:9091"} <= world.agents.keys()


def test_scaling_far_down_takes_no_place_from_a_pod_that_stays():
    world = Kubernetes()
    world.edit(replicas=12)
    world.passes()
    world.edit(replicas=1)
    world.passes()
    assert [r["servers"] for routes in world.agents.values() for r in routes["revisions"]] == [32] * len(world.agents)
    stored = world.cluster.objects[Key("ConfigMap", "ns", "chat-router")]
    assert json.loads(stored["data"]["routes.json"])["revisions"][0]["servers"] == 32


def test_a_canary_measures_and_is_promoted():
    world = Kubernetes(rollout=CANARY)
    world.passes()
    old = world.status["stable"]["revision"]
    world.edit(model=uri("b"))
    world.passes()
    new = world.status["candidate"]["revision"]
    assert (world.status["phase"], world.status["weight"]) == ("Canary", 50)
    assert world.condition("Ready")[0] == "False"
    assert world.condition("Available")[0] == "True"
    assert next(iter(world.agents.values()))["revisions"][0]["servers"] == 8
    world.requests = 100
    world.passes(seconds=10)
    assert len(world.queries) == 2
    assert f'proxy="{new}"' in world.queries[0]
    assert "[10s]" in world.queries[0]  # of a window of 60 s, what belongs to this step
    assert 'slmops_owner="chat"' in world.queries[0]
    assert f'slmops_revision="{new}"' in world.queries[1]
    assert world.status["stable"]["revision"] == new
    assert world.condition("Ready")[0] == "True"
    assert set(world.deployments()) == {old, new}
    world.passes(seconds=31)
    assert world.deployments() == {new: 2}
    assert Key("Service", "ns", f"chat-{old}") not in world.cluster.objects


def test_a_failed_measurement_rolls_back_and_says_so():
    world = Kubernetes(rollout=CANARY)
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    world.requests, world.answers = 100, [prometheus.Value(0.2)]
    world.passes(seconds=10)
    assert world.status["phase"] == "RolledBack"
    assert world.condition("Stalled")[:2] == ("True", "RolledBack")
    assert "Metric errors: 0.2 is above 0.01" in world.condition("Stalled")[2]
    assert "slmops.dev/retry=" in world.condition("Stalled")[2]
    assert world.condition("Reconciling") == ("", "", "")
    assert world.condition("Available")[0] == "True"
    assert "RollingBack" in [reason for _, reason, _ in world.cluster.posted]
    world.passes(seconds=31)
    assert len(world.deployments()) == 1
    retry = world.status["candidate"]["revision"]
    world.annotate(retry=retry)
    world.passes()
    assert world.status["phase"] in ("Canary", "Holding")
    assert world.status["rollout"]["handled"] == {"slmops.dev/retry": retry}


def test_a_source_that_is_not_ready_is_waited_for_and_the_stable_revision_serves_on():
    world = Kubernetes(model={"ref": {"kind": "QuantizedModel", "name": "q"}})
    world.passes()
    assert world.condition("Reconciling")[1] == "SourceNotReady"
    assert world.status["phase"] == "Pending"
    source(world, "1")
    world.passes()
    assert world.condition("Ready")[0] == "True"
    assert world.status["stable"]["source"] == "QuantizedModel/q"
    assert world.status["lineage"]["parents"][0]["digest"] == "sha256:parent"
    world.cluster.delete(Key("QuantizedModel", "ns", "q"))
    world.passes()
    assert world.condition("Ready")[0] == "False"
    assert world.condition("Reconciling")[1] == "SourceNotReady"
    assert world.condition("Available")[0] == "True"
    assert world.status["lineage"]["digest"] == "sha256:1"


def test_a_new_artifact_of_the_source_is_a_new_revision():
    world = Kubernetes(model={"ref": {"kind": "QuantizedModel", "name": "q"}}, rollout={"steps": []})
    source(world, "1")
    world.passes()
    old = world.status["stable"]["revision"]
    source(world, "2")
    world.passes()
    assert world.status["stable"]["revision"] != old
    assert world.status["lineage"]["digest"] == "sha256:2"


def test_a_name_of_63_characters_works():
    world = Kubernetes()
    obj = world.obj
    obj["metadata"] = {"name": "m" * 63, "namespace": "ns"}
    world.cluster.put(obj)
    key = Key("ModelDeployment", "ns", "m" * 63)
    world.driver().run(key)
    names = {k.name for k in world.cluster.objects if k.kind in ("Service", "Deployment", "ConfigMap", "Secret")}
    assert "m" * 63 in names
    assert all(len(name) <= 63 for name in names)
    assert len(names) == 3  # the stable address, the router, the revision


EDITS = {
    "SourceNotReady": {"model": {"ref": {"kind": "QuantizedModel", "name": "q"}}},
    "SecretNotFound": {"endpoint": {"apiKeysSecretRef": {"name": "keys"}}},
}


@pytest.mark.parametrize("reason", EDITS)
def test_a_candidate_that_is_no_longer_asked_for_gets_no_further(reason):
    """What is asked for instead may take an hour to be there: until then the other one must not become stable."""
    world = Kubernetes(rollout={"steps": [{"weight": 10, "pauseSeconds": 60}]})
    world.passes()
    stable = world.status["stable"]["revision"]
    world.edit(model=uri("b"))
    world.passes()
    second = world.status["candidate"]["revision"]
    world.edit(**EDITS[reason])
    for _ in range(60):
        world.passes(2, seconds=60)
    assert (world.status["stable"]["revision"], world.status["weight"]) == (stable, 10)
    assert world.condition("Reconciling")[:2] == ("True", reason)
    assert f"Revision {second} stays at 10 %" in world.condition("Reconciling")[2]
    source(world, "1")
    world.cluster.put({"kind": "Secret", "metadata": {"name": "keys", "namespace": "ns"}, "data": {"a": "Yg=="}})
    world.passes()
    assert world.status["candidate"]["revision"] not in (stable, second)
    assert world.status["stable"]["revision"] == stable


@pytest.mark.parametrize("reason", EDITS)
def test_the_first_revision_serves_until_there_is_what_is_asked_for_by_now(reason):
    """It has nobody to protect: without it, nothing would answer for as long as a training takes."""
    world = Kubernetes(rollout={"steps": [{"weight": 10, "pauseSeconds": 60}]})
    world.passes(1)
    first = world.status["candidate"]["revision"]
    world.broken[first] = {"containerStatuses": []}  # it pulls
    world.passes()
    world.edit(**EDITS[reason])
    world.passes()
    assert not world.status.get("stable")
    world.broken.clear()
    world.passes()
    assert world.status["stable"]["revision"] == first
    assert world.condition("Available")[0] == "True"


def test_a_candidate_that_waits_for_the_next_one_goes_on_when_it_is_asked_for_again():
    world = Kubernetes(rollout={"steps": [{"weight": 10, "pauseSeconds": 60}]})
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    second = world.status["candidate"]["revision"]
    world.edit(**EDITS["SourceNotReady"])
    world.passes(seconds=61)
    world.edit(model=uri("b"))
    world.passes()
    assert world.status["stable"]["revision"] == second


def test_a_candidate_that_waits_for_the_next_one_is_rolled_back_where_it_fails():
    world = Kubernetes(rollout=CANARY)
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    world.edit(**EDITS["SourceNotReady"])
    world.requests, world.answers = 100, [prometheus.Value(0.2)]
    world.passes(seconds=10)
    assert world.status["phase"] == "RolledBack"


def test_a_secret_that_may_not_be_read_stops_neither_the_candidate_nor_the_stable_revision(monkeypatch):
    """A policy that guards one Secret of the next revision must not let a bad one serve on."""
    world = Kubernetes(rollout=CANARY)
    world.passes()
    stable = world.status["stable"]["revision"]
    world.edit(model=uri("b"))
    world.passes()
    whole = world.cluster.get

    def guarded(key: Key) -> Object | None:
        if (key.kind, key.name) == ("Secret", "keys"):
            raise ClusterError(403, "Forbidden", 'secrets "keys" is forbidden')
        return whole(key)

    monkeypatch.setattr(world.cluster, "get", guarded)
    world.edit(**EDITS["SecretNotFound"])
    world.requests, world.answers = 100, [prometheus.Value(0.2)]
    assert world.passes(seconds=10) is not None  # no event will tell
    assert (world.status["phase"], world.status["stable"]["revision"]) == ("RolledBack", stable)
    assert world.condition("Ready")[1] == "Forbidden"
    assert '"keys"' in world.condition("Ready")[2]
    monkeypatch.undo()
    world.cluster.put({"kind": "Secret", "metadata": {"name": "keys", "namespace": "ns"}, "data": {"a": "Yg=="}})
    world.passes()
    assert world.status["candidate"]["revision"] != stable


def test_a_candidate_whose_own_source_is_not_ready_any_more_goes_on():
    world = Kubernetes(model=EDITS["SourceNotReady"]["model"], rollout={"steps": [{"weight": 10, "pauseSeconds": 60}]})
    source(world, "1")
    world.passes()
    source(world, "2")
    world.passes()
    second = world.status["candidate"]["revision"]
    world.cluster.delete(Key("QuantizedModel", "ns", "q"))
    world.passes(seconds=61)
    assert world.status["stable"]["revision"] == second


def test_the_pods_of_a_revision_pull_its_artifact_alone_from_a_folder_that_may_be_published_over():
    world = Kubernetes(model={"ref": {"kind": "QuantizedModel", "name": "q"}}, rollout={"steps": []})
    source(world, "1")
    world.passes()
    before = world.status["stable"]["revision"]
    source(world, "1", "pvc://models/q")
    world.passes()
    assert world.deployments() == {before: 2}, "an artifact is its content, wherever it lies"
    source(world, "2", "pvc://models/q")
    world.passes()
    pod = world.cluster.objects[Key("Deployment", "ns", f"chat-{world.status['stable']['revision']}")]["spec"]
    assert pod["template"]["spec"]["initContainers"][0]["command"][-2] == "pvc://models/q@sha256:2"
    claim = {"claimName": "models", "readOnly": True}
    assert {"name": "claim", "persistentVolumeClaim": claim} in pod["template"]["spec"]["volumes"]
