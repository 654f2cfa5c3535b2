"""What a former object of the same name has left behind: it is waited for, or told with the command that removes it."""

import re

import httpx
import pytest
from tests.unit.objects import NOW, Object, finetune, of
from tests.unit.serving_world import Kubernetes
from tests.unit.test_rollout_refusals import QUOTA

from slmops.cluster.memory import MemoryCluster, key_of
from slmops.cluster.port import Key
from slmops.reconcile.driver import Driver
from slmops.reconcile.table import reconcilers
from slmops.remote import router
from slmops.remote.errors import RemoteError, TokenRefusedError
from slmops.settings import Settings

COMMAND = re.compile(r"kubectl -n ns delete (\S+) -l slmops\.dev/owner-uid=(\S+)$")
SHORT = {"deploy": "Deployment", "job": "Job", "svc": "Service", "cm": "ConfigMap", "secret": "Secret",
         "pdb": "PodDisruptionBudget", "pod": "Pod", "rs": "ReplicaSet"}  # fmt: skip
FRONT = Key("Deployment", "ns", "chat-router")


def restored(cluster: MemoryCluster, key: Key) -> None:
    """The object has another uid, and what was made for it belongs to nobody: so a backup brings them back."""
    cluster.objects[key]["metadata"]["uid"] = "new"
    cluster.objects[key]["status"] = {"observedGeneration": -1}
    for child in cluster.objects.values():
        child["metadata"].pop("ownerReferences", None)
    cluster._applied.clear()


def obey(cluster: MemoryCluster, said: str) -> None:
    """Do as the message says."""
    found = COMMAND.search(said)
    assert found, said
    kinds = {SHORT[short] for short in found[1].split(",")}
    for key, obj in list(cluster.objects.items()):
        if key.kind in kinds and obj["metadata"].get("labels", {}).get("slmops.dev/owner-uid") == found[2]:
            cluster.delete(key)


def test_a_restored_model_deployment_says_what_to_remove_and_serves_then() -> None:
    world = Kubernetes()
    world.passes()
    restored(world.cluster, Key("ModelDeployment", "ns", "chat"))
    world.cluster.writes.clear()
    world.driver().run(Key("ModelDeployment", "ns", "chat"))
    assert {verb for verb, key in world.cluster.writes if key.kind != "ModelDeployment"} <= {"apply"}
    status, reason, message = world.condition("Reconciling")
    assert (status, reason) == ("True", "Leftover")
    obey(world.cluster, message)
    assert {key.kind for key in world.cluster.objects} == {"ModelDeployment"}  # at once, and not child by child
    world.agents.clear()
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")


def batch(status: Object | None = None) -> tuple[MemoryCluster, Driver, Key]:
    cluster = MemoryCluster()
    key = key_of(cluster.put(finetune(status)))
    read = reconcilers(lambda address: None)
    return cluster, Driver(cluster, Settings(store="oci://s"), read, lambda routes: None, clock=lambda: NOW), key


def test_a_restored_run_says_what_to_remove_and_starts_then() -> None:
    cluster, driver, key = batch()
    driver.run(key)
    restored(cluster, key)
    assert driver.run(key) == 30.0
    said = of(cluster.objects[key], "Reconciling")
    assert said is not None
    assert said["reason"] == "Leftover"
    obey(cluster, said["message"])
    driver.run(key)
    assert cluster.objects[Key("Job", "ns", "tune-finetune")]["metadata"]["ownerReferences"][0]["uid"] == "new"


@pytest.mark.parametrize(
    "changed",
    [
        {"slmops.dev/owner": "another"},
        {"slmops.dev/kind": "QuantizedModel"},
        {"app.kubernetes.io/managed-by": "Helm"},
        {"slmops.dev/owner-uid": "new"},  # somebody took its owner away: the command would remove what serves
        {"slmops.dev/owner-uid": ""},
    ],
)
def test_what_others_have_made_is_no_leftover(changed: dict[str, str]) -> None:
    cluster, driver, key = batch()
    driver.run(key)
    restored(cluster, key)
    cluster.objects[Key("Job", "ns", "tune-finetune")]["metadata"]["labels"].update(changed)
    driver.run(key)
    said = of(cluster.objects[key], "Reconciling")
    assert said is not None
    assert said["reason"] == "NameConflict"


@pytest.mark.parametrize("kind", ["Secret", "ConfigMap"])
def test_no_router_starts_with_what_a_deleted_namesake_has_left(kind: str) -> None:
    """Its containers would keep the token of the Secret that they started with."""
    world = Kubernetes()
    former = {"apiVersion": "slmops.dev/v1alpha1", "kind": "ModelDeployment", "name": "chat", "uid": "former"}
    metadata = {"name": "chat-router", "namespace": "ns", "ownerReferences": [former]}
    world.cluster.put({"apiVersion": "v1", "kind": kind, "metadata": metadata, "data": {}})
    world.passes(1)
    assert FRONT not in world.cluster.objects
    assert world.condition("Reconciling")[1] == "ChildTerminating"
    assert world.deployments()  # the servers need not wait
    world.cluster.delete(Key(kind, "ns", "chat-router"))
    world.passes()
    assert FRONT in world.cluster.objects
    assert world.condition("Ready")[:2] == ("True", "Serving")


def test_a_secret_that_may_not_be_written_takes_no_router_away() -> None:
    """Its quota is full, say: what it holds is ours all the same."""
    world = Kubernetes()
    world.passes()
    world.cluster.tamper("Secret")
    world.cluster.refusing["Secret"] = QUOTA
    world.cluster.delete(FRONT)
    world.passes()
    assert FRONT in world.cluster.objects


def test_a_router_that_refuses_the_token_is_not_called_silent() -> None:
    world = Kubernetes()
    world.passes(1)

    def refusing(url: str, secret: str) -> router.Report:
        raise TokenRefusedError(url)

    world.ask = refusing  # type: ignore[method-assign]
    world.passes()
    assert "2 of 2 routers refuse the operator's token" in world.condition("Reconciling")[2]
    assert "delete their pods" in world.condition("Reconciling")[2]


@pytest.mark.parametrize(("status", "error"), [(401, TokenRefusedError), (403, RemoteError), (503, RemoteError)])
def test_a_refused_token_is_known_by_its_status(status: int, error: type[Exception]) -> None:
    def handle(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json={"error": "Wrong token."})

    with httpx.Client(transport=httpx.MockTransport(handle)) as client, pytest.raises(RemoteError) as caught:
        router.observe("http://10.0.0.1:9091", "t", client=client)
    assert type(caught.value) is error
