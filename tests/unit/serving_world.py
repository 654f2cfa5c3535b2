"""A world for ModelDeployments on the cluster in memory: a Kubernetes that starts pods, and agents that obey."""

import contextlib
import json
from datetime import datetime, timedelta
from typing import Any

from tests.unit.objects import NOW, Object

from slmops.api import keys
from slmops.api.times import stamp
from slmops.cluster.memory import MemoryCluster, key_of
from slmops.cluster.port import ClusterError, Key
from slmops.handlers.metrics import Metrics
from slmops.reconcile.deployment import DeploymentReconciler
from slmops.reconcile.driver import Driver
from slmops.remote import prometheus
from slmops.remote.errors import RemoteError
from slmops.remote.router import Report, token
from slmops.settings import Settings

KEY = Key("ModelDeployment", "ns", "chat")
SETTINGS = Settings(router_key="k" * 32, prometheus_url="http://prometheus:9090", server_image="server:1")


class Refusing(MemoryCluster):
    """Refuses writes of some kinds as long as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.refusing: dict[str, ClusterError] = {}
        self.refusing_new: dict[str, ClusterError] = {}  # what exists may still be changed

    def apply(self, obj: Object, *, current: Object | None = None) -> Object:
        if obj["kind"] in self.refusing_new and key_of(obj) not in self.objects:
            raise self.refusing_new[obj["kind"]]
        return super().apply(obj, current=current)

    def tamper(self, kind: str) -> None:
        """Objects of this kind are to be applied again: somebody changed them."""
        for key in [key for key in self._applied if key.kind == kind]:
            del self._applied[key]

    def _allow(self, kind: str) -> None:
        if kind in self.refusing:
            raise self.refusing[kind]
        super()._allow(kind)


class Kubernetes:
    """The driver, and what it works on."""

    def __init__(self, **spec: Any) -> None:
        self.cluster, self.now = Refusing(), NOW
        self.settings, self.metrics = SETTINGS, Metrics()
        self.agents: dict[str, Object] = {}  # url -> routes
        self.draining: dict[Key, Object] = {}  # router pods on their way out, beside the wanted ones
        self.silent = False
        self.deaf: set[str] = set()  # urls of agents that refuse routes
        self.answers: list[prometheus.Answer] = []
        self.queries: list[str] = []
        self.requests = 0
        self.broken: dict[str, Object] = {}  # revision, or revision/number of a pod -> container status
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
            self.metrics.on_pass(KEY, 0.0, False)
        return wanted

    def try_pass(self) -> None:
        """A pass that may fail, as the queue runs it."""
        self.kubelet()
        with contextlib.suppress(ClusterError):
            self.driver().run(KEY)

    def driver(self) -> Driver:
        reconciler = DeploymentReconciler(self.ask, self.query)
        return Driver(
            self.cluster,
            self.settings,
            {"ModelDeployment": reconciler},
            self.push,
            on_counts=self.metrics.on_counts,
            clock=lambda: self.now,
        )

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
        for pod in self.draining.values():
            self.cluster.put(pod)

    def drain_router(self, address: str, until: datetime, number: int = 99) -> None:
        """A router pod that was told to end and has until then."""
        front = self.cluster.objects[Key("Deployment", "ns", "chat-router")]
        pod = self.pod(front, number)
        pod["metadata"]["deletionTimestamp"] = stamp(until)
        pod["status"]["podIP"] = address
        self.draining[key_of(pod)] = pod

    def pod(self, deployment: Object, number: int) -> Object:
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        whose = labels.get(keys.LABEL_REVISION, labels[keys.LABEL_ROLE])
        broken = self.broken.get(whose) or self.broken.get(f"{whose}/{number}")
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
        if routes.url in self.deaf:
            raise RemoteError(f"The router's agent at {routes.url} refuses.")
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


def source(world: Kubernetes, digest: str, folder: str = "") -> None:
    world.cluster.put({"kind": "QuantizedModel", "spec": {}, "metadata": {"name": "q", "namespace": "ns"}})
    ready = {"type": "Ready", "status": "True", "reason": "Done", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    world.cluster.set_status(
        Key("QuantizedModel", "ns", "q"),
        {
            "conditions": [ready],
            "artifact": {"uri": folder or f"oci://store/q@sha256:{digest}", "digest": f"sha256:{digest}"},
            "lineage": {
                "digest": f"sha256:{digest}",
                "parents": [{"kind": "model", "uri": "oci://store/p", "digest": "sha256:parent"}],
            },
        },
    )
