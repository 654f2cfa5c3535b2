"""Which pods an upgraded operator touches: those that fail for want of what was mended, and no others."""

import pytest
from tests.unit.objects import Object
from tests.unit.serving_world import SETTINGS, Kubernetes, uri

from slmops.api.times import stamp
from slmops.build import router as router_parts
from slmops.cluster.port import ClusterError, Key


def test_an_upgraded_operator_touches_no_pod_of_a_revision_that_exists():
    world = Kubernetes()
    world.passes()
    before = {k: v["spec"]["template"] for k, v in world.cluster.objects.items() if k.kind == "Deployment"}
    world.settings = SETTINGS.model_copy(update={"server_image": "server:2", "plain_http": "store:5000"})
    world.passes()
    assert world.condition("Ready")[0] == "True"
    assert {k: v["spec"]["template"] for k, v in world.cluster.objects.items() if k.kind == "Deployment"} == before
    world.edit(model=uri("b"), rollout={"steps": []})
    world.passes()
    new = world.cluster.objects[Key("Deployment", "ns", f"chat-{world.status['stable']['revision']}")]
    assert new["spec"]["template"]["spec"]["containers"][0]["image"] == "server:2"


NOT_PULLED = {
    "containerStatuses": [
        {"name": "server", "image": "server:1", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "none"}}}
    ]
}


def deployment_of(world: Kubernetes, revision: str) -> Object:
    return world.cluster.objects[Key("Deployment", "ns", f"chat-{revision}")]


def image_of(world: Kubernetes, revision: str) -> str:
    containers = deployment_of(world, revision)["spec"]["template"]["spec"]["containers"]
    return str(containers[0]["image"])


def uid_of(world: Kubernetes, revision: str) -> str:
    return str(deployment_of(world, revision)["metadata"]["uid"])


def serving() -> tuple[Kubernetes, str]:
    """A world that serves, and its stable revision."""
    world = Kubernetes()
    world.passes()
    return world, world.status["stable"]["revision"]


def upgrade(world: Kubernetes, image: str = "server:2") -> None:
    """The next pass is one of an operator with another server image."""
    world.settings = SETTINGS.model_copy(update={"server_image": image})


def settles(world: Kubernetes) -> None:
    """Passes write nothing more; once its pods are well, it serves."""
    world.cluster.writes.clear()
    world.passes()
    assert world.cluster.writes == []
    world.broken.clear()
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")


def test_a_mended_image_reaches_a_first_revision_and_touches_none_that_serves():
    pod = {"resources": {"limits": {"cpu": 2, "example.com/device": 1}}, "env": [{"name": "A", "value": "\u20ac"}],
           "tolerations": [{"key": "gpu", "operator": "Exists"}], "imagePullSecrets": [{"name": "s"}]}  # fmt: skip
    world = Kubernetes(pod=pod, endpoint={"apiKeysSecretRef": {"name": "keys"}}, engine={"args": ["--slots=4"]})
    world.cluster.put({"kind": "Secret", "metadata": {"name": "keys", "namespace": "ns"}, "data": {"a": "b"}})
    world.passes(1)
    name = world.status["candidate"]["revision"]
    world.broken[name] = NOT_PULLED
    world.passes()
    assert world.condition("Ready")[1] == "ImagePullFailed"
    first = uid_of(world, name)
    upgrade(world)
    world.passes()
    assert image_of(world, name) == "server:2"
    assert uid_of(world, name) != first  # its pods hold no device any more
    settles(world)
    upgrade(world, "server:3")
    world.broken[f"{name}/1"] = NOT_PULLED  # a node that has lost the image
    world.passes()
    assert image_of(world, name) == "server:2"


def test_a_mended_image_reaches_a_stable_revision_that_no_pod_can_serve_for_want_of_its_own():
    world, name = serving()
    world.broken[name] = NOT_PULLED  # the nodes are new ones, and the registry of before is gone
    world.passes()
    assert world.condition("Ready")[1] == "ImagePullFailed"
    first = uid_of(world, name)
    upgrade(world)
    world.passes()
    assert image_of(world, name) == "server:2"
    assert uid_of(world, name) != first
    settles(world)
    assert (world.status["stable"]["revision"], world.status.get("candidate")) == (name, None)


LOADING = {"containerStatuses": [{"name": "server", "image": "server:1", "state": {"running": {}}}]}
NO_NODE = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 free"}]}


def test_a_node_that_lacks_the_image_takes_no_pod_away_that_loads_on_another():
    world, name = serving()
    world.broken |= {f"{name}/0": LOADING, f"{name}/1": NOT_PULLED}
    upgrade(world)
    world.passes()
    assert world.condition("Ready")[1] == "ImagePullFailed"
    assert image_of(world, name) == "server:1"
    world.broken[f"{name}/0"] = NO_NODE  # it waits for the GPU that the other one has
    world.passes()
    assert image_of(world, name) == "server:2"


def test_a_mended_image_reaches_a_stable_revision_whose_deployment_could_not_be_removed_at_first():
    world, name = serving()
    first = uid_of(world, name)
    world.broken[name] = NOT_PULLED
    upgrade(world)
    world.cluster.refusing["Deployment"] = ClusterError(503, "ServiceUnavailable", "")
    world.try_pass()
    world.cluster.refusing.clear()
    world.passes()
    assert image_of(world, name) == "server:2"
    assert uid_of(world, name) != first  # never changed: its pods hold the GPUs


def test_a_stable_revision_that_fails_for_another_reason_keeps_its_pods_as_they_are():
    """An upgrade brings another image, too: one crash must not give it to those who did not ask for it."""
    world, name = serving()
    ended = {"exitCode": 1, "reason": "Error", "message": "x"}
    world.broken[name] = {"containerStatuses": [{"name": "server", "state": {"terminated": ended}}]}
    upgrade(world)
    world.passes()
    assert world.condition("Ready")[1] == "CrashLoopBackOff"
    assert image_of(world, name) == "server:1"


def test_a_candidate_that_is_made_anew_has_its_whole_time_again():
    """Else what was mended late is rolled back before its pods can be ready."""
    world = Kubernetes(rollout={"steps": [{"weight": 50, "pauseSeconds": 600}], "progressDeadlineSeconds": 60})
    world.passes()
    world.edit(model=uri("b"))
    world.passes(1)
    name = world.status["candidate"]["revision"]
    world.broken[name] = NOT_PULLED
    world.passes()
    upgrade(world)
    world.passes(1)
    assert not {"waitingSince", "waitingPods"} & set(world.status["rollout"])
    world.passes(seconds=59)
    assert image_of(world, name) == "server:2"
    world.passes(seconds=59)
    assert world.status["rollout"]["phase"] == "Preparing"
    world.passes(seconds=2)
    assert world.status["phase"] == "RolledBack"


@pytest.mark.parametrize("stable", [False, True])
def test_a_record_that_was_read_back_from_the_cluster_takes_no_pods_away(stable: bool):
    """It says all that the API server added; and the records of a whole cluster are lost by another router key."""
    world = Kubernetes()
    world.passes(1)
    name = world.status["candidate"]["revision"]
    if stable:
        world.passes()
    live = deployment_of(world, name)
    live["spec"]["progressDeadlineSeconds"] = 600
    live["spec"]["template"]["spec"]["schedulerName"] = "default-scheduler"
    world.cluster.put(live)
    stored = world.cluster.objects[Key("ConfigMap", "ns", "chat-router")]
    stored["data"] = {entry: text for entry, text in stored["data"].items() if not entry.endswith(".seal")}
    world.broken[name] = NOT_PULLED
    before = uid_of(world, name)
    world.passes()
    assert uid_of(world, name) == before
    assert deployment_of(world, name)["spec"]["progressDeadlineSeconds"] == 600
    world.cluster.writes.clear()
    world.passes()
    assert world.cluster.writes == []
    upgrade(world)
    world.passes()
    assert (image_of(world, name), uid_of(world, name) == before) == ("server:2", False)


def test_a_first_revision_whose_pods_take_their_time_is_left_alone():
    world = Kubernetes()
    world.passes(1)
    name = world.status["candidate"]["revision"]
    world.broken[name] = {"containerStatuses": []}  # not ready, and nothing says why
    world.passes()
    before = uid_of(world, name)
    upgrade(world)
    world.passes()
    assert (image_of(world, name), uid_of(world, name)) == ("server:1", before)


def test_a_first_revision_whose_last_pod_was_evicted_is_left_alone_while_the_next_one_loads():
    world = Kubernetes()
    world.passes(1)
    name = world.status["candidate"]["revision"]
    evicted = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    world.broken |= {f"{name}/0": evicted, f"{name}/1": LOADING}
    world.kubelet()
    for key, found in world.cluster.objects.items():
        if key.kind == "Pod" and name in key.name:
            found["metadata"]["creationTimestamp"] = stamp(world.now)
    world.passes()
    assert world.condition("Ready")[1] == "Evicted"
    before = uid_of(world, name)
    upgrade(world)
    world.passes()
    assert (image_of(world, name), uid_of(world, name)) == ("server:1", before)


def test_a_retry_after_a_wrong_image_takes_the_mended_one():
    world = Kubernetes(rollout={"steps": [{"weight": 50, "pauseSeconds": 1}], "progressDeadlineSeconds": 60})
    world.passes()
    old = world.status["stable"]["revision"]
    world.edit(model=uri("b"))
    world.passes(1)
    new = world.status["candidate"]["revision"]
    world.broken[new] = NOT_PULLED
    world.passes()
    world.passes(seconds=61)
    assert world.status["phase"] == "RolledBack"
    upgrade(world)
    world.annotate(retry=new)
    world.passes()
    assert (image_of(world, new), image_of(world, old)) == ("server:2", "server:1")
    assert world.status["rollout"]["phase"] == "Preparing"


def test_a_mended_image_survives_a_kill_between_the_record_and_the_deployment():
    world = Kubernetes()
    world.passes(1)
    name = world.status["candidate"]["revision"]
    world.broken[name] = NOT_PULLED
    world.passes()
    upgrade(world)
    world.passes(1)
    assert name not in world.deployments()
    world.cluster.refusing_new["Deployment"] = ClusterError(503, "ServiceUnavailable", "")
    world.try_pass()
    world.cluster.refusing_new.clear()
    world.passes()
    assert image_of(world, name) == "server:2"


def test_the_stable_revision_is_made_again_from_its_record_while_the_spec_has_moved_on():
    world = Kubernetes()
    world.passes()
    old = world.status["stable"]["revision"]
    world.edit(model=uri("b"))
    world.passes()
    template = world.cluster.objects[Key("Deployment", "ns", f"chat-{old}")]["spec"]["template"]
    world.cluster.delete(Key("Deployment", "ns", f"chat-{old}"))
    world.passes()
    assert world.cluster.objects[Key("Deployment", "ns", f"chat-{old}")]["spec"]["template"] == template
    world.cluster.delete(Key("ConfigMap", "ns", "chat-router"))
    world.passes()
    stored = world.cluster.objects[Key("ConfigMap", "ns", "chat-router")]
    assert old in router_parts.records_of(world.obj, stored, SETTINGS.router_key)


def test_the_stable_revision_is_made_again_from_its_record_by_an_upgraded_operator_too():
    """Somebody deleted its Deployment: that asks for no other image."""
    world, name = serving()
    before = deployment_of(world, name)
    upgrade(world)
    world.cluster.delete(Key("Deployment", "ns", f"chat-{name}"))
    world.passes()
    after = deployment_of(world, name)
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["spec"] == before["spec"]
