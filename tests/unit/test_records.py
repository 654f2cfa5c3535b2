"""The records of revisions stand in a ConfigMap of the user's namespace: what others write there makes nothing."""

import json
from typing import Any

import pytest
from tests.unit.objects import Object
from tests.unit.serving_world import Kubernetes, uri

from slmops.build.router import records_of
from slmops.build.serving import RESTARTED
from slmops.cluster.kinds import PLACES
from slmops.cluster.port import Key

MAP = Key("ConfigMap", "ns", "chat-router")


def served() -> tuple[Kubernetes, Key]:
    """A world that serves, and the Deployment of its stable revision."""
    world = Kubernetes()
    world.passes()
    return world, Key("Deployment", "ns", f"chat-{world.status['stable']['revision']}")


def rewrite(world: Kubernetes, key: Key, **metadata: Any) -> None:
    """Somebody puts a pod of his own into the record of the Deployment, and other metadata."""
    stored = world.cluster.objects[MAP]
    entry = f"deployment-{key.name.removeprefix('chat-')}.json"
    record = json.loads(stored["data"][entry])
    record["metadata"] |= metadata
    record["spec"]["template"]["spec"] = {
        "serviceAccountName": "mighty",
        "containers": [{"name": "c", "image": "evil", "securityContext": {"privileged": True}}],
    }
    data = stored["data"] | {entry: json.dumps(record, sort_keys=True, separators=(",", ":"))}
    world.cluster.put({**stored, "data": data})


@pytest.mark.parametrize("metadata", [{}, {"namespace": "kube-system"}, {"name": "../../kube-system/deployments/x"}])
def test_a_record_that_somebody_changed_makes_nothing(metadata: Object) -> None:
    world, key = served()
    before = world.cluster.objects[key]["spec"]
    rewrite(world, key, **metadata)
    world.cluster.writes.clear()
    world.passes()
    assert {(k.namespace, k.name) for verb, k in world.cluster.writes if k.kind == "Deployment"} <= {("ns", key.name)}
    assert world.cluster.objects[key]["spec"] == before
    world.edit(replicas=3)
    world.passes()
    assert world.cluster.objects[key]["spec"] == {**before, "replicas": 3}


def test_a_seal_is_of_one_record_of_one_object() -> None:
    world, key = served()
    revision, stored = key.name.removeprefix("chat-"), world.cluster.objects[MAP]
    secret = world.settings.router_key
    assert set(records_of(world.obj, stored, secret)) == {revision}
    assert records_of(world.obj, stored, "another key") == {}
    assert records_of({"metadata": {**world.obj["metadata"], "uid": "another"}}, stored, secret) == {}
    data = {name.replace(revision, "other"): text for name, text in stored["data"].items()}
    assert records_of(world.obj, {**stored, "data": data}, secret) == {}
    data = stored["data"] | {f"deployment-{revision}.seal": "é"}
    assert records_of(world.obj, {**stored, "data": data}, secret) == {}


def test_records_of_the_version_before_are_sealed_and_no_pod_is_touched() -> None:
    world, key = served()
    world.edit(model=uri("b"), rollout={"steps": [{"weight": 10, "approval": True}]})
    world.passes()  # the stable revision is history by now: the spec tells of another one
    before = {k: v["spec"]["template"] for k, v in world.cluster.objects.items() if k.kind == "Deployment"}
    break_seals(world)
    world.passes()
    assert {k: v["spec"]["template"] for k, v in world.cluster.objects.items() if k.kind == "Deployment"} == before
    world.cluster.delete(key)
    world.passes()
    assert world.cluster.objects[key]["spec"]["template"] == before[key]


def break_seals(world: Kubernetes) -> None:
    """The version before made none, and those of another key are none."""
    stored = world.cluster.objects[MAP]
    data = {name: text for name, text in stored["data"].items() if not name.endswith(".seal")}
    world.cluster.put({**stored, "data": data})
    world.cluster.tamper("ConfigMap")


def restart(world: Kubernetes, key: Key, time: str) -> None:
    """What `kubectl rollout restart` writes."""
    live = world.cluster.objects[key]
    template = live["spec"]["template"]
    notes = {**template["metadata"]["annotations"], RESTARTED: time}
    template = {**template, "metadata": {**template["metadata"], "annotations": notes}}
    world.cluster.put({**live, "spec": {**live["spec"], "template": template}})


def test_pods_can_be_restarted_also_where_a_record_was_read_back() -> None:
    world, key = served()
    before = world.cluster.objects[key]["spec"]["template"]["metadata"]["annotations"]
    restart(world, key, "2026-05-01T00:00:00Z")
    break_seals(world)
    world.passes()
    (record,) = records_of(world.obj, world.cluster.objects[MAP], world.settings.router_key).values()
    assert record["spec"]["template"]["metadata"]["annotations"] == before
    restart(world, key, "2026-05-02T00:00:00Z")
    world.cluster.tamper("Deployment")
    world.passes()
    assert world.cluster.objects[key]["spec"]["template"]["metadata"]["annotations"][RESTARTED].startswith("2026-05-02")


def test_a_name_leads_to_no_other_place_of_the_api() -> None:
    path = PLACES["Deployment"].path("ns", "../../../kube-system/deployments/x?dryRun=All")
    assert path.startswith("/apis/apps/v1/namespaces/ns/deployments/..%2F")
    assert path.count("/") == 7
    assert "?" not in path
    assert PLACES["Job"].path("ns", "a.b-c", "status") == "/apis/batch/v1/namespaces/ns/jobs/a.b-c/status"
