"""What a ModelDeployment says of itself: conditions as kstatus reads them, and why it waits."""

import re
from datetime import datetime

import pytest
from tests.unit.serving_world import ANALYSIS, CANARY, KEY, SETTINGS, Kubernetes, uri

from slmops.cluster.port import Key
from slmops.remote import prometheus
from slmops.settings import Settings


def test_the_first_pass_says_that_it_is_on_its_way():
    world = Kubernetes()
    world.passes(1)
    assert world.condition("Ready")[0] == "False"
    assert world.condition("Reconciling")[:2] == ("True", "Progressing")
    assert world.condition("Available")[0] == "False"
    assert world.status["observedGeneration"] == 1
    assert (world.status["phase"], world.status["ready"]) == ("Progressing", "0/2")


def test_pods_own_words_reach_the_condition_and_the_rollback():
    world = Kubernetes()
    world.passes()
    world.edit(model=uri("b"))
    world.passes(1)
    said = '{"reason": "SourceNotFound", "message": "There is nothing at oci://store:5000/m."}'
    ended = {"exitCode": 3, "reason": "Error", "message": said}
    pull = {"name": "pull", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": ended}}
    world.broken[world.status["candidate"]["revision"]] = {"initContainerStatuses": [pull]}
    world.passes()
    assert world.condition("Reconciling")[1] == "SourceNotFound"
    assert "There is nothing at" in world.condition("Reconciling")[2]
    world.passes(seconds=601)
    assert world.status["phase"] == "RolledBack"
    assert "There is nothing at" in world.condition("Stalled")[2]
    assert "The stable revision serves on." in world.condition("Stalled")[2]
    world.broken[world.status["stable"]["revision"]] = {"initContainerStatuses": [pull]}
    world.passes()
    assert "No pod of the stable revision is ready." in world.condition("Stalled")[2]


def test_a_person_is_waited_for_as_suspended():
    world = Kubernetes(rollout={"steps": [{"weight": 10, "approval": True}]})
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    assert world.condition("Suspended")[:2] == ("True", "Approval")
    assert world.condition("Reconciling")[0] == "True"
    world.annotate(promote=world.status["candidate"]["revision"])
    world.passes()
    assert world.condition("Suspended") == ("", "", "")
    assert world.condition("Ready")[0] == "True"


def test_what_is_paused_before_its_first_step_is_holding():
    world = Kubernetes(rollout={"steps": [{"weight": 10, "pauseSeconds": 60}]})
    world.passes()
    world.annotate(pause="*")
    world.edit(model=uri("b"))
    world.passes()
    assert (world.status["phase"], world.status["weight"]) == ("Holding", 0)
    assert world.condition("Suspended")[:2] == ("True", "Paused")
    world.annotate()
    world.passes()
    assert (world.status["phase"], world.status["weight"]) == ("Canary", 10)


def test_a_silent_router_is_held_against_nobody_but_the_rollout():
    world = Kubernetes()
    world.passes()
    world.silent = True
    world.edit(model=uri("b"))
    world.passes()
    assert world.condition("Reconciling")[1] == "RouterUnreachable"
    assert world.condition("Available")[0] == "True"
    world.silent = False
    world.passes()
    assert world.status["weight"] == 10


def test_a_router_that_may_not_exist_is_named():
    world = Kubernetes()
    world.passes(1)
    refused = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: small"}
    world.cluster.set_status(Key("Deployment", "ns", "chat-router"), {"conditions": [refused]})
    for _ in range(3):
        world.kubelet()
        for pod in [k for k in world.cluster.objects if k.kind == "Pod" and "router" in k.name]:
            world.cluster.delete(pod)
        world.driver().run(KEY)
    assert world.condition("Reconciling")[:2] == ("True", "QuotaExceeded")
    assert "exceeded quota: small" in world.condition("Reconciling")[2]


def test_scaled_to_zero_is_ready():
    world = Kubernetes()
    world.passes()
    world.edit(replicas=0)
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "ScaledToZero")
    assert (world.status["phase"], world.status["ready"]) == ("ScaledToZero", "0/0")
    assert world.condition("Available")[0] == "False"


def test_a_pod_that_goes_makes_it_not_ready_but_available():
    world = Kubernetes()
    world.passes()
    name = world.status["stable"]["revision"]
    pods = [k for k in world.cluster.objects if k.kind == "Pod" and name in k.name]
    world.cluster.set_status(pods[0], {"conditions": [{"type": "Ready", "status": "False"}]})
    world.driver().run(KEY)
    assert world.condition("Ready")[:2] == ("False", "PodsNotReady")
    assert world.condition("Available")[0] == "True"


def test_without_a_router_key_nothing_starts():
    world = Kubernetes()
    world.settings = Settings()
    world.passes(1)
    assert world.condition("Reconciling")[1] == "OperatorMisconfigured"


def test_kstatus_rules_hold_all_along():
    """Ready is always there; Reconciling or Stalled, never both, and neither while Ready."""
    world = Kubernetes(rollout=CANARY)
    world.requests = 100
    script = [{}, {"model": uri("b")}, {"model": uri("c")}, {"replicas": 0}, {"replicas": 3}, {"model": uri("a")}]
    for spec in script:
        world.edit(**spec)
        for _ in range(12):
            world.passes(1, seconds=5)
            on = {c["type"] for c in world.status["conditions"] if c["status"] == "True"}
            assert "Ready" in {c["type"] for c in world.status["conditions"]}
            assert len(on & {"Ready", "Reconciling", "Stalled"}) == 1
            assert world.status["observedGeneration"] == world.obj["metadata"]["generation"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (prometheus.NoData("no series"), "NoData"),
        (prometheus.Unreachable("down"), "Unreachable"),
        (prometheus.Inconclusive("2 series"), "Inconclusive"),
        (prometheus.Value(float("nan")), "NoData"),
    ],
)
def test_no_answer_holds(answer, reason):
    world = Kubernetes(rollout=CANARY)
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    world.requests, world.answers = 100, [answer] * 20
    for _ in range(7):
        world.passes(2, seconds=10)
    assert world.status["phase"] == "Holding"
    assert world.condition("Reconciling")[:2] == ("True", reason)
    world.answers = []
    world.passes(seconds=10)
    assert world.condition("Ready")[0] == "True"


class Forgetful(Kubernetes):
    """Its Prometheus lost its data and knows of so many answers since: of any a rate can be told."""

    knows = 8

    def query(self, url: str, promql: str, time: datetime) -> prometheus.Answer:
        super().query(url, promql, time)
        asked = re.search(
            r" and \(sum\(increase\(haproxy_backend_http_responses_total{.*}\[(?:60|120)s\]\)\) >= (\d+)\)$", promql
        )
        enough = asked is None or self.knows >= int(asked[1])
        return prometheus.Value(0.0) if enough else prometheus.NoData("The query found no series.")


@pytest.mark.parametrize(("min_samples", "held"), [(20, True), (16, False), (1, False), (0, False)])
def test_a_prometheus_that_lost_its_data_holds_until_it_knows_enough_of_the_step(min_samples, held):
    analysis = {**ANALYSIS, "intervalSeconds": 60, "windowSeconds": 5, "minSamples": min_samples}
    world = Forgetful(rollout={"steps": [{"weight": 50}], "analysis": analysis})
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    world.requests = 100
    world.passes(seconds=60)
    assert (world.condition("Reconciling")[1] == "NoData") == held
    assert ("10 answers of this step" in world.condition("Reconciling")[2]) == held
    assert (world.condition("Ready")[0] == "True") == (not held)
    world.knows = 10
    world.passes(seconds=60)
    assert world.condition("Ready")[0] == "True"


def test_without_a_prometheus_it_holds_and_says_what_to_set():
    world = Kubernetes(rollout=CANARY)
    world.settings = SETTINGS.model_copy(update={"prometheus_url": ""})
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    world.requests = 100
    world.passes(seconds=10)
    assert "set prometheus.url" in world.condition("Reconciling")[2]
    assert world.queries == []


def test_a_missing_secret_holds_the_new_revision_only():
    world = Kubernetes()
    world.passes()
    world.edit(endpoint={"apiKeysSecretRef": {"name": "keys"}})
    assert world.passes() == 10.0
    assert world.condition("Reconciling")[:2] == ("True", "SecretNotFound")
    assert world.status["candidate" if "candidate" in world.status else "stable"]
    assert len(world.deployments()) == 1
    world.cluster.put({"kind": "Secret", "metadata": {"name": "keys", "namespace": "ns"}, "data": {"a": "Yg=="}})
    world.passes()
    assert world.status["candidate"]
