"""The operator with the rights that the chart gives it and no others: they are enough, and hardly one is too many."""

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from tests.kube.api import Api, ApiError, Object, wait_for
from tests.kube.conftest import ROOT, Start
from tests.kube.kubelet import Kubelet, fail_job, fail_pod, finish_pod
from tests.kube.proxy import Proxy
from tests.kube.test_life import JOB, started_pod, tune, until_job

from localkube import tools
from slmops.cluster.kinds import PLACES

RBAC = "/apis/rbac.authorization.k8s.io/v1"
V1 = {"apiVersion": "rbac.authorization.k8s.io/v1"}
RELEASE = "slmops-system"
USER = f"system:serviceaccount:{RELEASE}:slmops-operator"
KEY = {"SLMOPS_ROUTER_KEY": "k"}


@pytest.fixture(scope="module")
def helm() -> str:
    tools.ensure(["helm"])
    return str(tools.path("helm"))


def rights(helm: str, *namespaces: str) -> list[Object]:
    """The operator's roles and bindings, as the chart renders them for these namespaces, or for all."""
    return [obj for obj in rendered(helm, *namespaces) if obj["metadata"]["name"].endswith("-operator")]


def rendered(helm: str, *namespaces: str) -> list[Object]:
    """All of the chart's roles and bindings."""
    flags = ["--set", f"watchNamespaces={{{','.join(namespaces)}}}"] if namespaces else []
    command = [helm, "template", "slmops", str(ROOT / "charts/slmops"), "--namespace", RELEASE, *flags]
    done = subprocess.run([*command, "--show-only", "templates/rbac.yaml"], capture_output=True, text=True, check=True)
    return [obj for obj in yaml.safe_load_all(done.stdout) if obj]


def bound(role: str, namespace: str, kind: str = "ClusterRole") -> Object:
    """What gives the role to somebody, in this namespace."""
    return {
        **V1,
        "kind": "RoleBinding",
        "metadata": {"name": role, "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "somebody"}],
    }


class Granted:
    """What is granted, until it is taken away."""

    def __init__(self, api: Api) -> None:
        self.api, self.urls = api, list[str]()

    def give(self, objects: list[Object]) -> None:
        for obj in objects:
            where = f"/namespaces/{obj['metadata']['namespace']}" if "namespace" in obj["metadata"] else ""
            url = f"{RBAC}{where}/{obj['kind'].lower()}s"
            try:
                self.api.ask("POST", url, obj)
            except ApiError as error:
                if error.status != 404:  # of a namespace that is not there
                    raise
            else:
                self.urls.append(f"{url}/{obj['metadata']['name']}")

    def take(self) -> None:
        while self.urls:
            self.api.ask("DELETE", self.urls.pop())


@pytest.fixture
def granted(api: Api, proxy: Proxy) -> Iterator[Granted]:
    proxy.user = USER
    found = Granted(api)
    yield found
    found.take()


def whole_life(api: Api) -> None:
    """All that leads to writes: a Secret, a failure, another try, success, the Job's end, a rollout's begin."""
    api.create("Secret", "hub", stringData={"token": "x"})
    api.create("ConfigMap", "data", data={"train": '{"prompt": "a", "completion": "b"}'})
    source = {"base": {"uri": "hf://org/m", "secretRef": {"name": "hub"}}, "ttlSecondsAfterFinished": 0}
    tune(api, **source, dataset={"configMap": {"name": "data", "key": "train"}})
    old = until_job(api)
    fail_pod(api, started_pod(api, old), 1, "AccessDenied", "the token is refused")
    fail_job(api, JOB)
    api.until_reason("FineTuneJob", "tune", "AccessDenied")
    api.patch("Secret", "hub", {"stringData": {"token": "new"}})
    wait_for("another Job", lambda: (api.get("Job", JOB) or old)["metadata"]["uid"] != old["metadata"]["uid"], 45)
    finish_pod(api, started_pod(api))
    api.until_phase("FineTuneJob", "tune", "Succeeded")
    wait_for("the Job to go", lambda: api.get("Job", JOB) is None)
    model = {"model": {"uri": "oci://r/m:1"}, "replicas": 2}
    api.create("ModelDeployment", "m", spec=model)
    wait_for("the rollout's Deployments", lambda: len(api.list("Deployment")) >= 2)
    wait_for("the run's Event", lambda: any(event["reason"] == "Succeeded" for event in api.list("Event")))
    wait_for("the rollout's status, written last", lambda: api.status("ModelDeployment", "m").get("rollout"))
    wait_for("and its Event", lambda: any(event["reason"] == "RolloutStarted" for event in api.list("Event")))


def test_the_cluster_role_is_enough(api: Api, start: Start, proxy: Proxy, granted: Granted, helm: str) -> None:
    granted.give(rights(helm))
    start(SLMOPS_NAMESPACES="", **KEY).until_ready()
    whole_life(api)
    assert proxy.denied == []
    (role,) = [obj for obj in rights(helm) if obj["kind"] == "ClusterRole"]
    # What other tests left in their namespaces may need more than this life.
    assert given(role) - used(proxy.requests) <= UNSEEN


def test_a_role_in_the_namespace_is_enough(api: Api, start: Start, proxy: Proxy, granted: Granted, helm: str) -> None:
    granted.give(rights(helm, api.namespace))
    start(**KEY).until_ready()
    whole_life(api)
    assert proxy.denied == []


def test_a_namespace_without_rights_stops_no_other(
    api: Api, start: Start, proxy: Proxy, granted: Granted, helm: str
) -> None:
    granted.give(rights(helm, api.namespace, "not-there"))
    operator = start(SLMOPS_NAMESPACES=f"{api.namespace},not-there", **KEY).until_ready()
    tune(api)
    with Kubelet(api):
        api.until_phase("FineTuneJob", "tune", "Succeeded")
    assert any("/namespaces/not-there/" in request for request in proxy.denied)
    assert operator.healthy()


def test_rights_that_are_taken_away_and_given_back(
    api: Api, start: Start, proxy: Proxy, granted: Granted, helm: str
) -> None:
    granted.give(rights(helm, api.namespace))
    operator = start(**KEY).until_ready()
    tune(api)
    until_job(api)
    process = operator.process.pid
    granted.take()
    proxy.error_in_watches(410)
    wait_for("refusals", lambda: proxy.denied)
    wait_for("readiness to tell", lambda: (said := operator.get("/readyz")) is not None and said.status_code == 503)
    assert operator.healthy()
    granted.give(rights(helm, api.namespace))
    operator.until_ready()
    with Kubelet(api):
        api.until_phase("FineTuneJob", "tune", "Succeeded", 60)
    assert operator.process.pid == process


def test_a_secret_that_may_not_be_read_is_said(
    api: Api, start: Start, proxy: Proxy, granted: Granted, helm: str
) -> None:
    objects: list[Any] = rights(helm, api.namespace)
    for obj in objects:
        obj["rules"] = [rule for rule in obj.get("rules") or [] if rule["resources"] != ["secrets"]]
        if obj["kind"] != "Role":
            del obj["rules"]
    granted.give(objects)
    start(**KEY).until_ready()
    tune(api, base={"uri": "hf://org/m", "secretRef": {"name": "hub"}})
    status = api.until_reason("FineTuneJob", "tune", "Forbidden")
    assert "secrets" in str(status["conditions"])
    assert api.get("Job", JOB) is None


@pytest.mark.parametrize(("roles", "changes"), [(["view"], 403), (["view", "edit"], 200)])
def test_users_scale_who_may_edit(
    api: Api, proxy: Proxy, granted: Granted, helm: str, roles: list[str], changes: int
) -> None:
    """Nobody puts the chart's roles into Kubernetes' own here: edit has what view has."""
    names = [f"{RELEASE}-slmops-{role}" for role in roles]
    granted.give([obj for obj in rendered(helm) if obj["metadata"]["name"] in names])
    granted.give([bound(name, api.namespace) for name in names])
    api.create("ModelDeployment", "m", spec={"model": {"uri": "oci://r/m:1"}})
    proxy.user = "somebody"
    url = proxy.url + api.path("ModelDeployment", "m", "scale")
    wait_for("the rights", lambda: httpx.get(url, trust_env=False).status_code == 200)
    merge = {"Content-Type": "application/merge-patch+json"}

    def scaled() -> int:
        return httpx.patch(url, json={"spec": {"replicas": 3}}, headers=merge, trust_env=False).status_code

    wait_for(f"the answer {changes}", lambda: scaled() == changes)
    assert api.need("ModelDeployment", "m")["spec"]["replicas"] == (3 if changes == 200 else 1)


Right = tuple[str, str, str]  # group, resource, verb

# Rights that whole_life() does not need.
UNSEEN: set[Right] = {
    # An admission plugin that is off by default asks for these, for blockOwnerDeletion.
    *(("slmops.dev", f"{place.plural}/finalizers", "update") for place in PLACES.values() if place.ours),
    # At the end of a rollout; see test_rollout_reconciler.
    ("apps", "deployments", "delete"),
    ("", "services", "delete"),
    ("policy", "poddisruptionbudgets", "delete"),
    # A kind's status is written when there is something to say: whole_life() has these two kinds.
    ("slmops.dev", "distillationjobs/status", "patch"),
    ("slmops.dev", "quantizedmodels/status", "patch"),
    # A source that is named: these two kinds are named by others.
    ("slmops.dev", "distillationjobs", "get"),
    ("slmops.dev", "quantizedmodels", "get"),
    # Of a Job that has had no pod for half a minute; and the same Event once more.
    ("", "events", "list"),
    ("", "events", "get"),
    ("", "events", "patch"),
}


def given(role: Object) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


PATH = re.compile(
    r"^(?:/api/v1|/apis/(?P<group>[^/]+)/[^/]+)(?:/namespaces/[^/]+)?"
    r"/(?P<resource>[a-z]+)(?P<name>/[^/]+)?(?P<sub>/[a-z]+)?$"
)


def used(requests: list[str]) -> set[Right]:
    """What these requests need: a server-side apply creates as well as it patches."""
    found: set[Right] = set()
    for request in requests:
        method, url = request.split(" ", 1)
        path, _, query = url.partition("?")
        match = PATH.match(path)
        if match is None:
            continue
        verbs = {"POST": ["create"], "DELETE": ["delete"], "PATCH": ["patch"]}.get(method, ["get"])
        if method == "GET" and not match["name"]:
            verbs = ["watch"] if "watch=true" in query else ["list"]
        if method == "PATCH" and "force=true" in query:
            verbs = ["create", "patch"]
        found |= {(match["group"] or "", match["resource"] + (match["sub"] or ""), verb) for verb in verbs}
    return found
