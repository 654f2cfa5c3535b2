"""The small parts: identity, queries, verdicts, verbs, sizes, and the manifests."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.objects import ours
from tests.unit.rollout_world import revision
from tests.unit.serving_world import Kubernetes

from slmops.api import keys
from slmops.api.base import Model
from slmops.api.deployment import AnalysisMetric, ModelDeploymentSpec, Revision, RolloutStatus, ServedModel
from slmops.api.meta import Artifact, SecretRef
from slmops.api.run import Input
from slmops.build import router, serving
from slmops.rollout.queries import Context, promql
from slmops.rollout.revision import identify
from slmops.rollout.verbs import Verb, obey
from slmops.rollout.verdicts import judge
from slmops.settings import Settings

DIGEST = "sha256:" + "a" * 64
MODEL = Input(uri="oci://store/m@" + DIGEST, name="QuantizedModel/q")
SETTINGS = Settings(server_image="server:1", router_image="router:1")
FULL: dict[str, Any] = {
    "model": {"ref": {"kind": "QuantizedModel", "name": "q"}},
    "servedName": "shop",
    "engine": {"args": ["--slots", "4"]},
    "pod": {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "1Gi"}}, "nodeSelector": {"gpu": "yes"}},
}


def spec(**changes: Any) -> ModelDeploymentSpec:
    return ModelDeploymentSpec.model_validate(FULL | changes)


def name_of(one: ModelDeploymentSpec, model: Input = MODEL, digest: str = DIGEST) -> str:
    return identify("chat", one, model, digest).revision


# Identity.


def longest(model: type[Model], field: str) -> int:
    return next(mark.max_length for mark in model.model_fields[field].metadata if hasattr(mark, "max_length"))


@pytest.mark.parametrize(("field", "filled"), [("uri", "oci://store/"), ("name", "")])
def test_whatever_the_crd_lets_a_spec_say_its_revision_can_say_too(field: str, filled: str):
    """Else an upgrade, which hashes anew, would refuse as invalid what has been served all along."""
    name = "n" * longest(SecretRef, "name")
    source: Any = {"ref": {"kind": "QuantizedModel", "name": name}}
    if field == "uri":
        source = {"uri": filled.ljust(longest(ServedModel, "uri"), "m")}
    served = "s" * longest(ModelDeploymentSpec, "served_name")
    one = spec(model=source, servedName=served, endpoint={"apiKeysSecretRef": {"name": name}})
    model = Input(uri=one.model.uri or "u" * longest(Artifact, "uri"), name=f"QuantizedModel/{name}")
    found = identify("chat", one, model, "d" * longest(Artifact, "digest"))
    assert (found.served_name, found.api_keys_secret, found.model) == (served, name, model.uri)
    assert Revision.model_validate(found.wire()) == found


def test_revisions_never_change_between_versions_of_the_operator():
    """These hashes are in users' clusters: if this test fails, every deployment would roll at the next upgrade."""
    assert name_of(spec()) == "a886c76203"
    plain = ModelDeploymentSpec.model_validate({"model": {"uri": "oci://store/m:1"}})
    assert name_of(plain, Input(uri="oci://store/m:1"), "") == "06d1250d63"  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"replicas": 9},
        {"rollout": {"steps": []}},
        {"engine": {"name": "auto", "args": ["--slots", "4"]}},
        {"engine": {"name": "onnxruntime-genai", "args": ["--slots", "4"]}},
        {"pod": FULL["pod"] | {"env": [], "tolerations": []}},
        {"model": {"ref": {"kind": "QuantizedModel", "name": "other-object-same-artifact"}}},
    ],
)
def test_what_is_no_new_revision(changes):
    assert name_of(spec(**changes)) == name_of(spec())


@pytest.mark.parametrize(
    "changes",
    [
        {"servedName": "other"},
        {"engine": {"args": ["--slots", "8"]}},
        {"engine": {"args": ["--slots", "4"], "image": "mine:1"}},
        {"engine": {"args": ["--slots", "4"], "name": "openvino"}},
        {"pod": {}},
        {"pod": FULL["pod"] | {"image": "mine:1"}},
        {"endpoint": {"apiKeysSecretRef": {"name": "keys"}}},
    ],
)
def test_what_is_a_new_revision(changes):
    assert name_of(spec(**changes)) != name_of(spec())


def test_an_empty_variable_is_the_same_revision_however_it_is_written():
    """The API server wrote the value that was left out, until its default went: both are in users' clusters."""
    stored, written = ([{"name": "A", **value}] for value in ({"value": ""}, {}))
    assert name_of(spec(pod={"env": stored})) == name_of(spec(pod={"env": written})) == "dfae14b7c7"


def test_a_model_is_its_content_where_that_is_known_and_its_address_where_not():
    moved = MODEL.model_copy(update={"uri": "oci://elsewhere/m@" + DIGEST})
    assert name_of(spec(), moved) == name_of(spec())
    assert name_of(spec(), digest="sha256:b") != name_of(spec())
    assert name_of(spec(), moved, "") != name_of(spec(), MODEL, "")
    assert name_of(spec(), MODEL.model_copy(update={"secret": "s"})) != name_of(spec())


# Verdicts and queries.


@pytest.mark.parametrize(
    ("low", "high", "value", "verdict"),
    [
        (None, 1.0, 1.0, "Pass"),
        (None, 1.0, 1.01, "Fail"),
        (0.5, None, 0.5, "Pass"),
        (0.5, None, 0.4, "Fail"),
        (0.5, 1.0, 0.7, "Pass"),
        (None, 1.0, float("nan"), "NoData"),
        (None, 1.0, float("inf"), "NoData"),
    ],
)
def test_judging(low, high, value, verdict):
    said = judge(AnalysisMetric(name="m", query="x", min=low, max=high), value)
    assert said.verdict == verdict
    json.dumps(said.wire(), allow_nan=False)  # it can be stored


def test_queries_are_filled_in():
    context = Context("ns", "shop", "bbb", "aaa", 60, step=1800, least=0)
    text = 'x{ns="{{namespace}}",o="{{name}}",r=~"{{revision}}|{{stable}}"}[{{window}}]'
    mine = AnalysisMetric(name="m", query=text, max=1)
    assert promql(mine, context) == 'x{ns="ns",o="shop",r=~"bbb|aaa"}[60s]'
    errors = promql(AnalysisMetric(name="m", builtin="errorRate", max=1), context)
    assert '_responses_total{namespace="ns",slmops_owner="shop",proxy="bbb",code="5xx"}[60s]' in errors
    assert " - " not in errors  # a difference of counts from two scrapes makes errors of nothing
    cut = 'slmops_streams_cut_total{namespace="ns",slmops_owner="shop",slmops_revision="bbb"}[60s]'
    assert f"(sum(rate({cut})) or vector(0))" in errors  # another image's servers do not have it
    latency = promql(AnalysisMetric(name="m", builtin="latencyP95", max=1), context)
    assert '_seconds_bucket{namespace="ns",slmops_owner="shop",slmops_revision="bbb"}[60s]' in latency
    step = Context("ns", "shop", "bbb", "aaa", 60, step=1800, least=250)
    seen = {
        "errorRate": 'haproxy_backend_http_responses_total{namespace="ns",slmops_owner="shop",proxy="bbb",'
        'code=~"2xx|3xx|4xx|5xx"}',
        "latencyP95": 'vllm:e2e_request_latency_seconds_count{namespace="ns",slmops_owner="shop",'
        'slmops_revision="bbb"}',
    }
    for builtin, query in (("errorRate", errors), ("latencyP95", latency)):
        wanted = f"({query}) and (sum(increase({seen[builtin]}[1800s])) >= 250)"
        assert promql(AnalysisMetric(name="m", builtin=builtin, max=1), step) == wanted
    assert promql(mine, step) == promql(mine, context)
    long = promql(
        AnalysisMetric(name="m", builtin="errorRate", max=1),
        replace(step, name="m" * 63 + ".x"),
    )
    assert f'slmops_owner="{keys.label_value("m" * 63 + ".x")}"' in long


# Verbs.


@pytest.mark.parametrize(
    ("verb", "value", "phase", "wanted", "handled"),
    [
        (Verb.ABORT, "bbb", "Step", Verb.ABORT, True),
        (Verb.ABORT, "*", "Preparing", Verb.ABORT, True),
        (Verb.ABORT, "ccc", "Step", None, False),
        (Verb.ABORT, "aaa", "Step", None, True),
        (Verb.ABORT, "bbb", "RolledBack", None, True),
        (Verb.PROMOTE, "bbb", "Preparing", Verb.PROMOTE, True),
        (Verb.PROMOTE, "bbb/2", "Step", Verb.PROMOTE, True),
        (Verb.PROMOTE, "*", "Promoting", None, True),
        (Verb.RETRY, "bbb", "RollingBack", None, False),
        (Verb.RETRY, "*", "RolledBack", Verb.RETRY, True),
        (Verb.RETRY, "bbb", "Step", None, True),
        (Verb.RETRY, "", "RolledBack", None, False),
    ],
)
def test_verbs(verb, value, phase, wanted, handled):
    done, todo = obey({verb: value}, RolloutStatus(phase=phase), revision("aaa"), revision("bbb"))
    assert todo == wanted
    assert done == ({verb: value} if handled else {})
    again = obey({verb: value}, RolloutStatus(phase=phase, handled=done), revision("aaa"), revision("bbb"))
    assert again[1] == (None if handled else wanted)


# Manifests.

OWNER = ours("ModelDeployment", FULL, name="chat")


def pods_of(*manifests: Any) -> list[Any]:
    return [m["spec"]["template"]["spec"] for m in manifests]


def test_all_pods_satisfy_pod_security_restricted_and_have_no_token():
    servers = serving.deployment(OWNER, spec(), "rev", MODEL, SETTINGS)
    for one in pods_of(servers, router.deployment(OWNER, spec(), "s3cret", SETTINGS)):
        assert one["automountServiceAccountToken"] is False
        assert one["securityContext"]["runAsNonRoot"] is True
        assert one["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*one.get("initContainers", []), *one["containers"]]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
        kinds = {kind for volume in one["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}


def test_the_server_pod_pulls_then_serves():
    made = serving.deployment(OWNER, spec(), "rev", MODEL, SETTINGS)
    (one,) = pods_of(made)
    pull, server = one["initContainers"][0], one["containers"][0]
    assert pull["command"] == ["python3", "-m", "slmops_artifacts", "pull", MODEL.uri, "/model"]
    assert server["command"] == [
        "slmops-server", "--model", "/model", "--served-name", "shop", "--port", "8000", "--metrics-port", "9090",
        "--slots", "4",
    ]  # fmt: skip
    assert server["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "1Gi"}
    assert pull["resources"]["limits"] == {"memory": "1Gi"}
    assert one["nodeSelector"] == {"gpu": "yes"}
    assert made["spec"]["selector"]["matchLabels"].items() <= made["spec"]["template"]["metadata"]["labels"].items()
    assert made["spec"]["template"]["metadata"]["labels"][keys.LABEL_REVISION] == "rev"
    assert {p["name"] for p in server["ports"]} == {"http", "metrics"}


def test_routers_go_where_taints_let_the_servers_and_ask_for_none_of_their_nodes():
    taint = {"key": "team", "operator": "Exists", "effect": "NoSchedule"}
    more = {"tolerations": [taint], "imagePullSecrets": [{"name": "pull"}], "priorityClassName": "high"}
    own = spec(pod=FULL["pod"] | more)
    (server,) = pods_of(serving.deployment(OWNER, own, "rev", MODEL, SETTINGS))
    (one,) = pods_of(router.deployment(OWNER, own, "s3cret", SETTINGS))
    assert one["tolerations"] == server["tolerations"] == [taint]
    assert one["imagePullSecrets"] == [{"name": "pull"}]
    (plain,) = pods_of(router.deployment(OWNER, spec(pod=None), "s3cret", SETTINGS))
    assert one.keys() - plain.keys() == {"tolerations", "imagePullSecrets"}
    assert pods_of(router.deployment(OWNER, spec(), "s3cret", SETTINGS)) == [plain]


def test_the_charts_values_fit_the_routers_to_the_cluster():
    place = {"nodeSelector": {"kubernetes.io/arch": "amd64"}, "priorityClassName": "high"}
    values = {"resources": {"limits": {"cpu": 1}}, **place}
    settings = Settings.from_env({"SLMOPS_ROUTER_POD": json.dumps(values)})
    (one,) = pods_of(router.deployment(OWNER, spec(), "s3cret", settings))
    (plain,) = pods_of(router.deployment(OWNER, spec(), "s3cret", Settings()))
    assert one["containers"][0]["resources"] == {"limits": {"cpu": "1"}}
    assert plain["containers"][0]["resources"] == {
        "requests": {"cpu": "50m", "memory": "64Mi"},
        "limits": {"memory": "512Mi"},
    }
    assert (one["nodeSelector"], one["priorityClassName"]) == ({"kubernetes.io/arch": "amd64"}, "high")
    assert one.keys() - plain.keys() == {"nodeSelector", "priorityClassName"}


def test_an_engine_is_named_to_the_server_before_the_users_own_arguments():
    named = spec(engine={"name": "openvino", "args": ["--slots", "4"]})
    (one,) = pods_of(serving.deployment(OWNER, named, "rev", MODEL, SETTINGS))
    assert one["containers"][0]["command"][-4:] == ["--engine", "openvino", "--slots", "4"]
    for chosen_by_the_server in ("auto", "onnxruntime-genai"):
        (one,) = pods_of(serving.deployment(OWNER, spec(engine={"name": chosen_by_the_server}), "rev", MODEL, SETTINGS))
        assert "--engine" not in one["containers"][0]["command"]


def test_sources_bring_their_mounts():
    more = {"registry_secret": "store", "plain_http": "r:5000", "hf_endpoint": "http://hf"}
    settings = SETTINGS.model_copy(update=more)
    claimed = Input(uri="pvc://models/one", secret="hub")
    guarded = spec(endpoint={"apiKeysSecretRef": {"name": "keys"}})
    (one,) = pods_of(serving.deployment(OWNER, guarded, "rev", claimed, settings))
    pull, server = one["initContainers"][0], one["containers"][0]
    mounts = {m["name"]: m for m in pull["volumeMounts"]}
    assert mounts["claim"] == {"name": "claim", "mountPath": "/slmops/pvc/models", "readOnly": True}
    assert pull["command"][-4:] == ["--secret-name", "hub", "--secret-dir", mounts["model-secret"]["mountPath"]]
    env = {e["name"]: e["value"] for e in pull["env"]}
    assert env["SLMOPS_REGISTRY_AUTH"] == f"{mounts['registry']['mountPath']}/.dockerconfigjson"
    assert (env["SLMOPS_PLAIN_HTTP"], env["HF_ENDPOINT"]) == ("r:5000", "http://hf")
    assert "--api-keys-dir" in server["command"]
    assert {m["name"] for m in server["volumeMounts"]} == {"tmp", "model", "api-keys"}  # no registry password
    assert {v["name"] for v in one["volumes"]} == {"tmp", "model", "api-keys", "model-secret", "registry", "claim"}
    same = Input(uri="oci://r/m:1", secret="store")
    (two,) = pods_of(serving.deployment(OWNER, spec(), "rev", same, settings))
    paths = [m["mountPath"] for m in two["initContainers"][0]["volumeMounts"]]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("text", ["$(HOME)", "costs $$5", "$", "a$$(B)$", "--x=$(A) $$"])
def test_dollars_in_arguments_reach_the_process_as_they_were_written(text: str):
    """The kubelet puts variables in the place of $(NAME) in commands, and makes one $ of two."""
    wanted = spec(servedName=text, engine={"args": ["--chat-template", text]})
    source = Input(uri=f"oci://r/{text}:1".replace(" ", ""))
    (one,) = pods_of(serving.deployment(OWNER, wanted, "rev", source, SETTINGS))

    def arrives(command: list[str]) -> list[str]:
        sign = re.compile(r"\$(?:(\$)|\(([^)]*)\))")
        return [sign.sub(lambda found: "$" if found[1] else "EXPANDED", word) for word in command]

    server = arrives(one["containers"][0]["command"])
    assert server[server.index("--served-name") + 1] == server[-1] == text
    assert source.uri in arrives(one["initContainers"][0]["command"])


def test_the_token_is_in_no_pod_spec_and_no_config_map():
    made = router.deployment(OWNER, spec(), "s3cret", SETTINGS)
    assert "s3cret" not in json.dumps([made, router.config_map(OWNER, {}, {}, "k"), router.service(OWNER)])
    assert made != router.deployment(OWNER, spec(), "another", SETTINGS)  # or the pods would keep the old one
    assert router.token_secret(OWNER, "s3cret")["data"] == {"token": "czNjcmV0"}


def test_answers_that_run_have_three_minutes_and_routers_outlive_the_servers():
    (server,) = pods_of(serving.deployment(OWNER, spec(), "rev", MODEL, SETTINGS))
    (front,) = pods_of(router.deployment(OWNER, spec(), "token", SETTINGS))
    assert server["terminationGracePeriodSeconds"] == 180
    assert front["terminationGracePeriodSeconds"] > server["terminationGracePeriodSeconds"]


def test_another_grace_touches_no_pod_of_a_revision_that_exists(monkeypatch: pytest.MonkeyPatch):
    world = Kubernetes()
    world.passes()
    (key,) = [k for k in world.cluster.objects if k.kind == "Deployment" and k.name != "chat-router"]
    before = world.cluster.objects[key]["spec"]["template"]
    monkeypatch.setattr(serving, "GRACE_SECONDS", 7)
    world.edit(replicas=3)
    world.passes()
    assert world.cluster.objects[key]["spec"]["replicas"] == 3
    assert world.cluster.objects[key]["spec"]["template"] == before


def test_records_come_back_as_they_were_and_broken_ones_count_as_lost():
    made = serving.deployment(OWNER, spec(), "rev", MODEL, SETTINGS)
    stored = router.config_map(OWNER, {"a": 1}, {"rev": made}, "k")
    assert router.records_of(OWNER, stored, "k") == {"rev": made}
    stored["data"]["deployment-bad.json"] = "{"
    stored["data"]["deployment-odd.json"] = "[]"
    assert set(router.records_of(OWNER, stored, "k")) == {"rev"}
    assert router.records_of(OWNER, None, "k") == {}


@pytest.mark.parametrize("name", ["m" * 63, "m" * 59, "a.b", "x" * 253])
def test_long_names_give_valid_and_different_children(name):
    owner = ours("ModelDeployment", FULL, name=name)
    names = [router.service_name(owner), router.router_name(owner), serving.revision_name(owner, "0123456789"),
             serving.revision_name(owner, "abcdef0123"), serving.budget_name(owner, "server")]  # fmt: skip
    assert len(set(names)) == len(names)
    assert all(len(n) <= 63 and "." not in n and n.strip("-") == n for n in names)


def test_two_routers_where_there_are_two_servers():
    assert [router.router_pods(spec(replicas=n)) for n in (0, 1, 2, 50)] == [1, 1, 2, 2]
    places = [router.routes(OWNER, {"a": 100}, "a", "", n)["revisions"][0]["servers"] for n in (1, 4, 5, 100)]
    assert places == [8, 8, 16, 256]


@pytest.mark.parametrize(
    "strange", [{}, {"revisions": None}, {"revisions": ["a", {}, {"revision": "a", "servers": "64"}]}]
)
def test_a_router_keeps_the_places_of_a_revision_that_is_scaled_down(strange):
    """Its pods lie in any of them, and one without a place gets no requests before DNS forgets the pods that went."""
    one, two = (router.routes(OWNER, {"a": 100}, "a", "", n) for n in (12, 5))
    wanted = router.routes(OWNER, {"a": 90, "b": 10}, "a", "", 1, [two, one, strange])
    assert {r["revision"]: r["servers"] for r in wanted["revisions"]} == {"a": 32, "b": 8}
    assert router.routes(OWNER, {"a": 100}, "a", "", 20, [one])["revisions"][0]["servers"] == 64


def test_deployments_whose_names_are_alike_have_no_child_in_common():
    def children(name: str) -> set[tuple[str, str]]:
        owner = ours("ModelDeployment", FULL, name=name)
        token, made = "t", [router.service(owner), router.config_map(owner, {}, {}, "k")]
        made += [router.token_secret(owner, token), router.deployment(owner, spec(), token, SETTINGS)]
        made += [serving.disruption_budget(owner, role) for role in ("server", "router")]
        made += [serving.headless_service(owner, "0123456789")]
        made += [serving.deployment(owner, spec(), "0123456789", MODEL, SETTINGS)]
        return {(one["kind"], one["metadata"]["name"]) for one in made}

    names = ["chat", "chat-router", "chat-servers", "chat-routers", "m" * 63, "m" * 62, "m" * 62 + "n"]
    found = [children(name) for name in names]
    assert len(set.union(*found)) == sum(len(one) for one in found)
