"""ModelDeployment through the driver, on the cluster in memory: a Kubernetes that starts pods, and agents that obey."""

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.unit.objects import NOW, Object

from slmops.api import keys
from slmops.build import router as router_parts
from slmops.cluster.memory import MemoryCluster, key_of
from slmops.cluster.port import Key
from slmops.reconcile.deployment import DeploymentReconciler
from slmops.reconcile.driver import Driver
from slmops.remote import prometheus
from slmops.remote.errors import RemoteError
from slmops.remote.router import Report, token
from slmops.settings import Settings

KEY = Key("ModelDeployment", "ns", "chat")
SETTINGS = Settings(router_key="k" * 32, prometheus_url="http://prometheus:9090", server_image="server:1")


class Kubernetes:
    """The driver, and what it works on."""

    def __init__(self, **spec: Any) -> None:
        self.cluster, self.now = MemoryCluster(), NOW
        self.settings = SETTINGS
        self.agents: dict[str, Object] = {}  # url -> routes
        self.silent = False
        self.answers: list[prometheus.Answer] = []
        self.queries: list[str] = []
        self.requests = 0
        self.broken: dict[str, Object] = {}  # revision -> container status of its pods
        self.create(**spec)

    def create(self, **spec: Any) -> None:
        whole = {"model": {"uri": "oci://store:5000/m@sha256:" + "a" * 64}, "replicas": 2, **spec}
        obj = {"apiVersion": keys.API_VERSION, "kind": "ModelDeployment", "spec": whole}
        metadata = {"name": "chat", "namespace": "ns"}
        self.cluster.put(obj | {"metadata": metadata, "status": {"observedGeneration": -1}})

    def edit(self, **spec: Any) -> None:
        obj = self.obj
        self.cluster.put(obj | {"spec": obj["spec"] | spec})

    def annotate(self, **verbs: str) -> None:
        obj = self.obj
        found = {f"slmops.dev/{verb}": value for verb, value in verbs.items()}
        obj["metadata"]["annotations"] = found
        self.cluster.put(obj)

    @property
    def obj(self) -> Object:
        found = self.cluster.get(KEY)
        assert found is not None
        return found

    @property
    def status(self) -> Object:
        return self.obj["status"]

    def condition(self, kind: str) -> tuple[str, str, str]:
        for c in self.status["conditions"]:
            if c["type"] == kind:
                return c["status"], c["reason"], c["message"]
        return "", "", ""

    def passes(self, count: int = 6, seconds: float = 0) -> float | None:
        self.now += timedelta(seconds=seconds)
        for _ in range(count):
            self.kubelet()
            wanted = self.driver().run(KEY)
        return wanted

    def driver(self) -> Driver:
        reconciler = DeploymentReconciler(self.ask, self.query)
        return Driver(self.cluster, self.settings, {"ModelDeployment": reconciler}, self.push, clock=lambda: self.now)

    def kubelet(self) -> None:
        """Start and stop pods as the Deployments say."""
        wanted: set[Key] = set()
        for key, found in list(self.cluster.objects.items()):
            if key.kind == "Deployment":
                for number in range(found["spec"]["replicas"]):
                    pod = self.pod(found, number)
                    wanted.add(key_of(pod))
                    if key_of(pod) not in self.cluster.objects:
                        self.cluster.put(pod)
                    self.cluster.set_status(key_of(pod), pod["status"])
        for key in [k for k in self.cluster.objects if k.kind == "Pod" and k not in wanted]:
            self.cluster.delete(key)

    def pod(self, deployment: Object, number: int) -> Object:
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        broken = self.broken.get(labels.get(keys.LABEL_REVISION, labels[keys.LABEL_ROLE]))
        status: Object = {"podIP": f"10.0.0.{number + 1}", "conditions": [{"type": "Ready", "status": "True"}]}
        if broken:
            status = {"conditions": [{"type": "Ready", "status": "False"}], **broken}
        metadata = {"name": f"{deployment['metadata']['name']}-{number}", "namespace": "ns", "labels": labels}
        return {"kind": "Pod", "status": status, "spec": {}, "metadata": metadata}

    def ask(self, url: str, secret: str) -> Report:
        assert secret == token(SETTINGS.router_key, self.obj["metadata"]["uid"])
        if self.silent:
            raise RemoteError("silent")
        if url not in self.agents:  # it starts with what its ConfigMap says
            stored = self.cluster.get(Key("ConfigMap", "ns", "chat-router"))
            assert stored is not None
            self.agents[url] = json.loads(stored["data"]["routes.json"])
        routes = self.agents[url]
        ready = {k.name.rsplit("-", 2)[1] for k, v in self.cluster.objects.items() if k.kind == "Pod"
                 and v["status"]["conditions"][0]["status"] == "True"}  # fmt: skip
        shares = {}
        for r in routes["revisions"]:
            name, weight, count = r["revision"], r["weight"], self.requests * r["weight"] // 100
            shares[name] = {"weight": weight, "ready": 9 * (name in ready), "requests": count, "chosen": count}
        return Report.model_validate(
            {"routes": routes, "epoch": routes["epoch"], "turns": self.requests, "revisions": shares}
        )

    def push(self, routes: Any) -> None:
        if self.silent:
            raise RemoteError("silent")
        assert routes.token
        self.agents[routes.url] = routes.body

    def query(self, url: str, promql: str, time: datetime) -> prometheus.Answer:
        assert (url, time) == (SETTINGS.prometheus_url, self.now)
        self.queries.append(promql)
        return self.answers.pop(0) if self.answers else prometheus.Value(0.0)

    def deployments(self) -> dict[str, int]:
        return {
            found["metadata"]["labels"][keys.LABEL_REVISION]: found["spec"]["replicas"]
            for key, found in self.cluster.objects.items()
            if key.kind == "Deployment" and keys.LABEL_REVISION in found["metadata"]["labels"]
        }


def uri(letter: str) -> Object:
    return {"uri": "oci://store:5000/m@sha256:" + letter * 64}


ANALYSIS = {"intervalSeconds": 10, "minSamples": 20, "passes": 1, "failureLimit": 0,
            "metrics": [{"name": "errors", "builtin": "errorRate", "max": 0.01},
                        {"name": "p95", "builtin": "latencyP95", "max": 2.0}]}  # fmt: skip
CANARY = {"steps": [{"weight": 50}], "analysis": ANALYSIS}


def test_the_first_pass_says_that_it_is_on_its_way():
    world = Kubernetes()
    world.passes(1)
    assert world.condition("Ready")[0] == "False"
    assert world.condition("Reconciling")[:2] == ("True", "Progressing")
    assert world.condition("Available")[0] == "False"
    assert world.status["observedGeneration"] == 1
    assert (world.status["phase"], world.status["ready"]) == ("Progressing", "0/2")


def test_a_served_model_is_ready_and_at_rest():
    world = Kubernetes()
    assert world.passes() is None
    assert world.condition("Ready")[:2] == ("True", "Serving")
    assert world.condition("Available")[0] == "True"
    assert [c["type"] for c in world.status["conditions"]] == ["Ready", "Available"]
    assert world.status["endpoint"] == "http://chat.ns.svc:8000/v1"
    assert world.status["ready"] == "2/2"
    assert world.status["selector"].endswith("slmops.dev/role=server")
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
    for _ in range(5):
        world.passes(2, seconds=10)
    assert world.status["phase"] == "Holding"
    assert world.condition("Reconciling")[:2] == ("True", reason)
    world.answers = []
    world.passes(seconds=10)
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
    assert old in router_parts.records_of(world.cluster.objects[Key("ConfigMap", "ns", "chat-router")])


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


def source(world: Kubernetes, digest: str) -> None:
    world.cluster.put({"kind": "QuantizedModel", "spec": {}, "metadata": {"name": "q", "namespace": "ns"}})
    ready = {"type": "Ready", "status": "True", "reason": "Done", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    world.cluster.set_status(
        Key("QuantizedModel", "ns", "q"),
        {
            "conditions": [ready],
            "artifact": {"uri": f"oci://store/q@sha256:{digest}", "digest": f"sha256:{digest}"},
            "lineage": {
                "digest": f"sha256:{digest}",
                "parents": [{"kind": "model", "uri": "oci://store/p", "digest": "sha256:parent"}],
            },
        },
    )


def test_a_new_artifact_of_the_source_is_a_new_revision():
    world = Kubernetes(model={"ref": {"kind": "QuantizedModel", "name": "q"}}, rollout={"steps": []})
    source(world, "1")
    world.passes()
    old = world.status["stable"]["revision"]
    source(world, "2")
    world.passes()
    assert world.status["stable"]["revision"] != old
    assert world.status["lineage"]["digest"] == "sha256:2"


def test_a_model_that_is_not_onnx_is_refused_and_what_serves_goes_on():
    world = Kubernetes()
    world.passes()
    world.edit(model={"ref": {"kind": "FineTuneJob", "name": "tune"}})
    world.passes()
    assert world.condition("Stalled")[:2] == ("True", "UnsupportedModel")
    assert "QuantizedModel" in world.condition("Stalled")[2]
    assert world.condition("Available")[0] == "True"
    world.edit(replicas=3)
    world.passes()
    assert list(world.deployments().values()) == [3]


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
    assert world.condition("Reconciling")[:2] == ("True", "PodsForbidden")
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
