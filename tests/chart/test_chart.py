"""What the chart renders, by the real helm: values are checked, all is restricted, the CRDs are the generated ones."""

import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from slmops.api.meta import Pod
from slmops.build import parts
from slmops.reconcile import sources
from slmops.remote.access import FOLDER
from slmops.settings import Settings
from slmops_artifacts.errors import ArtifactError
from slmops_artifacts.uris import parse

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/slmops"
HELM = ROOT / ".local/bin/helm"

pytestmark = pytest.mark.skipif(
    not HELM.exists() and not shutil.which("helm"), reason="needs helm: `make up` or `make kube` builds it"
)

Object = dict[str, Any]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(HELM) if HELM.exists() else "helm"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def render(*sets: str, release: str = "slmops", namespace: str = "slmops-system") -> list[Object]:
    flags = [part for item in sets for part in ("--set", item)]
    done = helm("template", release, str(CHART), "--namespace", namespace, *flags)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def plain(value: Any) -> Any:
    """Numbers as floats: helm writes 1.0 as 1 and 2.0e-05 as 2e-05, which YAML 1.1 readers take for text."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, bool) or value is None:
        return value
    try:
        return float(value)
    except ValueError:
        return value


EVERYTHING = ("prometheus.bundled.enabled=true", "podMonitor.enabled=true")


def test_lint_is_clean() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_charts_crds_are_the_generated_ones() -> None:
    generated = {path.name: path.read_text() for path in (ROOT / "crds").glob("*.yaml")}
    copied = {path.name: path.read_text() for path in (CHART / "files/crds").glob("*.yaml")}
    assert generated == copied, "run `make crds`"
    rendered = [found for found in render() if found["kind"] == "CustomResourceDefinition"]
    assert len(rendered) == 4
    for crd in rendered:
        assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        source = yaml.safe_load(generated[f"{crd['metadata']['name']}.yaml"])
        assert plain(crd["spec"]) == plain(source["spec"])


@pytest.mark.parametrize(
    "found",
    render(*EVERYTHING) if HELM.exists() or shutil.which("helm") else [],
    ids=lambda found: f"{found['kind']}-{found['metadata']['name']}",
)
def test_every_pod_is_restricted(found: Object) -> None:
    pod = found.get("spec", {}).get("template", {}).get("spec")
    if not pod:
        return
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "automountServiceAccountToken" in pod
    assert pod["enableServiceLinks"] is False  # a Service slmops-metrics would set SLMOPS_METRICS_PORT=tcp://...
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"  # else each start chowns every file
    for container in pod["containers"] + pod.get("initContainers", []):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "limits" in container["resources"]


def test_no_namespace_given_means_a_cluster_role_and_some_mean_roles() -> None:
    kinds = {
        (f["kind"], f["metadata"].get("namespace")) for f in render() if f["metadata"]["name"].endswith("-operator")
    }
    assert ("ClusterRole", None) in kinds
    bound = render("watchNamespaces={one,two}")
    operator_roles = {
        f["metadata"].get("namespace")
        for f in bound
        if f["kind"] == "Role" and f["metadata"]["name"] == "slmops-operator"
    }
    assert operator_roles == {"one", "two"}
    assert not [f for f in bound if f["kind"] == "ClusterRoleBinding"]


def test_the_operator_lists_no_secrets_and_no_configmaps() -> None:
    (role,) = [f for f in render() if f["kind"] == "ClusterRole" and f["metadata"]["name"].endswith("-operator")]
    for rule in role["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        if set(rule["resources"]) & {"secrets", "configmaps"}:
            assert not set(rule["verbs"]) & {"list", "watch", "deletecollection"}


def environment(objects: list[Object]) -> dict[str, str]:
    (operator,) = [f for f in objects if f["kind"] == "Deployment" and f["metadata"]["name"] == "slmops-operator"]
    (container,) = operator["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def test_store_and_prometheus_follow_the_values() -> None:
    env = environment(render())
    assert env["SLMOPS_STORE"] == "oci://slmops-registry.slmops-system.svc:5000"
    assert env["SLMOPS_PLAIN_HTTP"] == "slmops-registry.slmops-system.svc:5000"
    assert env["SLMOPS_PROMETHEUS_URL"] == ""
    assert (
        environment(render(*EVERYTHING))["SLMOPS_PROMETHEUS_URL"] == "http://slmops-prometheus.slmops-system.svc:9090"
    )
    assert environment(render("hfEndpoint=null", "prometheus.url=null")) == env
    dollars = "http://u:a$$b$(SLMOPS_STORE)@prom"
    told = environment(render(f"prometheus.url={dollars}", f"hfEndpoint={dollars}", "store.url=pvc://c/$$x"))
    assert told["SLMOPS_PROMETHEUS_URL"] == told["SLMOPS_HF_ENDPOINT"] == parts.literal(dollars)
    assert told["SLMOPS_STORE"] == parts.literal("pvc://c/$$x")
    own = environment(
        render("registry.enabled=false", "store.url=oci://registry.example.com/ml", "prometheus.url=http://prom:9090")
    )
    assert own["SLMOPS_STORE"] == "oci://registry.example.com/ml"
    assert own["SLMOPS_PLAIN_HTTP"] == ""
    assert own["SLMOPS_PROMETHEUS_URL"] == "http://prom:9090"


def test_what_prometheus_wants_is_mounted_where_the_operator_reads_it() -> None:
    def mounted(*sets: str) -> list[tuple[str, Object]]:
        spec = pods(render(*sets))["slmops-operator"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        return [(path, volumes[name]["secret"]) for path, name in mounts.items() if "secret" in volumes[name]]

    assert mounted() == []
    assert mounted("prometheus.existingSecret=mine") == [(str(FOLDER), {"secretName": "mine"})]


def operator_key(objects: list[Object]) -> Object:
    (operator,) = [f for f in objects if f["kind"] == "Deployment" and f["metadata"]["name"] == "slmops-operator"]
    (container,) = operator["spec"]["template"]["spec"]["containers"]
    (found,) = [entry for entry in container["env"] if entry["name"] == "SLMOPS_ROUTER_KEY"]
    named: Object = found["valueFrom"]["secretKeyRef"]
    return named


def test_a_key_of_ones_own_makes_every_rendering_the_same() -> None:
    flags = ("router.existingSecret=mine",)
    first, second = render(*flags), render(*flags)
    assert first == second
    assert not [f for f in first if f["kind"] == "Secret"]
    assert operator_key(first) == {"name": "mine", "key": "key"}
    (made,) = [f for f in render() if f["kind"] == "Secret"]
    assert made["metadata"]["name"] == operator_key(render())["name"]
    assert made["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


# One organisation in upper case, as GitHub shows it, would end every run of an installation.
NO_STORES = (
    "oci://ghcr.io/MyOrg", "oci://r/a:v1", "oci://r/a@sha256:12", "oci://r/a//b", "oci://u:p@r/a", "oci://r/a-", "pvc://Claim/x",
    "pvc://c/x@sha256:12",
)  # fmt: skip
STORES = (
    "oci://h", "oci://h:5000", "oci://registry.example.com/my-org/ml.models/a__b", "oci://[::1]:5000/x", "pvc://c", "pvc://c/X/y",
)  # fmt: skip


@pytest.mark.parametrize(("url", "good"), [*((url, True) for url in STORES), *((url, False) for url in NO_STORES)])
def test_a_store_is_taken_that_every_object_finds_a_place_in(url: str, good: bool) -> None:
    owner = {"kind": "FineTuneJob", "metadata": {"name": "tuned", "namespace": "team-a", "uid": "0a1b2c3d"}}
    output = sources.resolve_output(owner, None, Settings.model_construct(store=url))
    with nullcontext() if good else pytest.raises(ArtifactError):
        assert parse(output.artifact) != parse(output.checkpoint)
    with nullcontext() if good else pytest.raises(ValidationError):
        Settings(store=url)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("bogus=1", "bogus"),
        ("operator.workers=0", "workers"),
        ("imagePullPolicy=Sometimes", "imagePullPolicy"),
        ("store.url=http://registry", "url"),
        *((f"store.url={url}", "url") for url in NO_STORES),
        ("store.secretName=My_Secret", "secretName"),
        ("operator.priorityClassName=My_Class", "priorityClassName"),
        ("router.priorityClassName=My_Class", "priorityClassName"),
        ("router.nodeSelector.my pool=a", "nodeSelector"),
        ("router.nodeSelector.pool=a b", "nodeSelector"),
        ("nodeSelector.-pool=a", "nodeSelector"),
        ("podMonitor.labels.a/b/c=d", "labels"),
        ("router.existingSecret=Not_A_Name", "existingSecret"),
        ("prometheus.url=prom:9090", "url"),
        ("prometheus.existingSecret=Not_A_Name", "existingSecret"),
        ("watchNamespaces={UPPER}", "watchNamespaces"),
        ("watchNamespaces={a.b}", "watchNamespaces"),
        ("registry.persistence.size=big", "size"),
        ("registry.persistence.size=10K", "size"),
        ("registry.persistence.size=10ki", "size"),
        ("prometheus.bundled.retention=1h1d", "retention"),
        ("prometheus.bundled.scrapeInterval=", "scrapeInterval"),
        ("podMonitor.interval=15sec", "interval"),
    ],
)
def test_wrong_values_are_refused_by_name(value: str, word: str) -> None:
    done = helm("template", "slmops", str(CHART), "--set", value)
    assert done.returncode != 0
    assert word in done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "watchNamespaces={a-b,c}",
        *(f"store.url={url}" for url in STORES),
        *(f"registry.persistence.size={size}" for size in ("10k", "10Ki", "1.5Gi", "2T")),
        *(f"prometheus.bundled.retention={retention}" for retention in ("6h", "1d12h", "1y", "90m")),
        "prometheus.bundled.scrapeInterval=1m30s",
        "podMonitor.interval=1m30s",
        *(
            f"{place}.{key}=a-B_1"
            for place in ("nodeSelector", "router.nodeSelector")
            for key in ("Pool", r"k8s\.io/a_b\.c")
        ),
        "router.nodeSelector.pool=",
    ],
)
def test_what_kubernetes_and_prometheus_take_the_schema_takes(value: str) -> None:
    flags = [part for item in EVERYTHING for part in ("--set", item)]
    done = helm("template", "slmops", str(CHART), *flags, "--set", value)
    assert done.returncode == 0, done.stderr


def test_settings_cover_the_charts_variables() -> None:
    settings = (ROOT / "operator/slmops/settings.py").read_text()
    for name in environment(render()):
        assert f"{name.removeprefix('SLMOPS_').lower()}:" in settings, name


@pytest.mark.parametrize(
    ("release", "service"), [("team.slmops", "team-slmops-registry"), ("1", "slmops-1-registry"), ("x1", "x1-registry")]
)
def test_whatever_its_name_a_release_has_services(release: str, service: str) -> None:
    """A Service's name has no dots and starts with a letter, a release's may be otherwise."""
    found = render(release=release, namespace="n")
    assert {f["metadata"]["name"] for f in found if f["kind"] == "Service"} == {service}
    (operator,) = [f for f in found if f["kind"] == "Deployment" and f["metadata"]["name"].endswith("-operator")]
    assert f"oci://{service}.n.svc:5000" in json.dumps(operator)


def texts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of what Kubernetes wants as text: all metadata, and names that lead to other objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, path)
    elif re.search(r"(metadata|matchLabels|subjects|imagePullSecrets)\b|\.(name|\w+Name)$", path):
        yield path, value


@pytest.mark.parametrize(("release", "namespace"), [("1", "2024"), ("1e3", "0x10"), ("true", "null")])
def test_names_that_yaml_takes_for_numbers_stay_names(release: str, namespace: str) -> None:
    lists = ("watchNamespaces[0]=7", "imagePullSecrets[0]=8")
    single = (
        "router.existingSecret=9",
        "operator.priorityClassName=10",
        "registry.persistence.storageClassName=11",
        "prometheus.existingSecret=12",
    )
    flags = [part for item in (*lists, *single) for part in ("--set-string", item)]
    everywhere = [part for item in EVERYTHING for part in ("--set", item)]
    for more in (everywhere, [*everywhere, *flags]):
        done = helm("template", release, str(CHART), "--namespace", namespace, *more)
        assert done.returncode == 0, done.stderr
        found = [f for f in yaml.safe_load_all(done.stdout) if f and f["kind"] != "CustomResourceDefinition"]
        leaves = [leaf for f in found for leaf in texts(f, f["kind"])]
        assert ("Deployment.metadata.namespace", namespace) in leaves
        assert [leaf for leaf in leaves if not isinstance(leaf[1], str)] == []


def test_the_registry_may_collect_garbage_for_long_and_is_not_asked_meanwhile() -> None:
    """Nothing listens then: a restart would break the collection off, time and again."""
    (container,) = pods(render())["slmops-registry"]["spec"]["containers"]
    live, ready = ({"failureThreshold": 3, **container[probe]} for probe in ("livenessProbe", "readinessProbe"))
    assert 600 <= live["periodSeconds"] * live["failureThreshold"] <= 1800
    assert ready["periodSeconds"] * ready["failureThreshold"] <= 10


def pods(objects: list[Object]) -> dict[str, Object]:
    """The pod templates of the Deployments, by name."""
    return {f["metadata"]["name"]: f["spec"]["template"] for f in objects if f["kind"] == "Deployment"}


def test_all_pods_go_where_the_values_say() -> None:
    placed = pods(render(*EVERYTHING, r"nodeSelector.kubernetes\.io/arch=amd64", "tolerations[0].operator=Exists"))
    assert set(placed) == {"slmops-operator", "slmops-registry", "slmops-prometheus"}
    for pod in placed.values():
        assert pod["spec"]["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
        assert pod["spec"]["tolerations"] == [{"operator": "Exists"}]
    for pod in pods(render(*EVERYTHING)).values():
        assert not {"nodeSelector", "tolerations"} & set(pod["spec"])


def of_version(version: str, folder: Path) -> list[Object]:
    """The chart as another version of it would be rendered, all else being equal."""
    chart = shutil.copytree(CHART, folder / "slmops")
    named = re.sub(r"^version: .*$", f"version: {version}", (chart / "Chart.yaml").read_text(), flags=re.MULTILINE)
    (chart / "Chart.yaml").write_text(named)
    flags = [part for item in EVERYTHING for part in ("--set", item)]
    done = helm("template", "slmops", str(chart), *flags, "--set", "router.existingSecret=key")
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


@pytest.mark.parametrize("version", ["0.1.0+0123456789ab.1", "0.1.0-" + "x" * 49 + "-y"])
def test_another_version_of_the_chart_has_valid_labels_and_starts_no_pod_anew(version: str, tmp_path: Path) -> None:
    """Flux adds the commit to the version of a chart from Git, after a plus sign; others add a branch's name."""
    first, other = of_version("0.1.0", tmp_path / "a"), of_version(version, tmp_path / "b")
    assert pods(first) == pods(other)
    for found in other:
        for value in found["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value), value
    assert first[0]["metadata"]["labels"] != other[0]["metadata"]["labels"]


class Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, as Kustomize does where it works on what helm has rendered."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: twice in {keys}"
        return super().construct_mapping(node, deep)


def test_no_key_is_rendered_twice() -> None:
    flags = [part for item in EVERYTHING for part in ("--set", item)]
    assert len(list(yaml.load_all(helm("template", "slmops", str(CHART), *flags).stdout, Strict))) > 10


def test_every_service_is_let_in_where_everything_else_is_denied() -> None:
    """A Prometheus whose port is closed answers no rollout, and each would hold for ever.

    What only the kubelet asks is let in from the pod's node anyway.
    """
    found = render(*EVERYTHING)
    policies = [f["spec"] for f in found if f["kind"] == "NetworkPolicy"]
    services = {f["metadata"]["name"]: f["spec"] for f in found if f["kind"] == "Service"}
    assert set(services) == {"slmops-registry", "slmops-prometheus"}
    for template in pods(found).values():
        labels = template["metadata"]["labels"]
        ports = {p["name"]: p["containerPort"] for c in template["spec"]["containers"] for p in c["ports"]}
        selecting = [s for s in policies if s["podSelector"]["matchLabels"].items() <= labels.items()]
        let_in = {p["port"] for s in selecting for rule in s["ingress"] for p in rule["ports"] if "from" not in rule}
        assert let_in == {port for name, port in ports.items() if name != "probes"}
    off = render(*EVERYTHING, "networkPolicies.enabled=false")
    assert not [f for f in off if f["kind"] == "NetworkPolicy"]


def test_a_parent_chart_may_say_whether_it_takes_this_one() -> None:
    """The condition of a dependency is a value of its own: `slmops.enabled`."""
    assert pods(render("enabled=true")).keys() == pods(render()).keys()


def test_the_routers_pods_are_as_the_values_say() -> None:
    def pod(*sets: str) -> Pod:
        return Settings.from_env(environment(render(*sets))).router_pod

    assert parts.resources(pod()) == parts.resources(Settings().router_pod)
    assert parts.placement(pod()) == {}
    place = ("router.nodeSelector.kubernetes\\.io/arch=amd64", "router.priorityClassName=high")
    own = pod("router.resources.limits.cpu=2", *place)
    assert parts.resources(own)["limits"] == {"cpu": "2", "memory": "512Mi"}
    assert parts.placement(own) == {"nodeSelector": {"kubernetes.io/arch": "amd64"}, "priorityClassName": "high"}


def test_another_scrape_interval_makes_another_prometheus_pod() -> None:
    def prometheus(interval: str) -> Object:
        return pods(render(*EVERYTHING, f"prometheus.bundled.scrapeInterval={interval}"))["slmops-prometheus"]

    assert prometheus("5s") == prometheus("5s")
    assert prometheus("5s") != prometheus("30s")


def test_what_an_uninstall_keeps_is_found_by_the_label_in_the_docs() -> None:
    found = render()
    kept = [f for f in found if "helm.sh/resource-policy" in f["metadata"].get("annotations", {})]
    kinds = {"CustomResourceDefinition", "ClusterRole", "PersistentVolumeClaim", "Secret"}
    assert {f["kind"] for f in kept} == kinds
    roles = {f["metadata"]["name"] for f in found if f["kind"] == "ClusterRole"}
    assert roles - {f["metadata"]["name"] for f in kept} == {"slmops-system-slmops-operator"}  # the people keep theirs
    assert {f["metadata"]["labels"]["app.kubernetes.io/part-of"] for f in kept} == {"slmops"}
    docs = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    for words in ("crd,clusterrole", "pvc,secret"):
        assert f"delete {words} -l app.kubernetes.io/part-of=slmops" in docs


def test_the_operators_metrics_alone_keep_the_namespace_that_they_name() -> None:
    """Else each deployment's counters get the operator's namespace, and those of two namespaces become one."""
    found = render(*EVERYTHING)
    (config,) = [f["data"]["prometheus.yml"] for f in found if "prometheus.yml" in f.get("data", {})]
    jobs = {job["job_name"]: job["honor_labels"] for job in yaml.safe_load(config)["scrape_configs"]}
    assert jobs == {"slmops-objects": False, "slmops-operator": True}
    monitors = {f["metadata"]["name"]: f["spec"] for f in found if f["kind"] == "PodMonitor"}
    kept = {name: [point["honorLabels"] for point in spec["podMetricsEndpoints"]] for name, spec in monitors.items()}
    assert kept == {"slmops-objects": [False], "slmops-operator": [True]}
    (operator,) = [f for f in found if f["kind"] == "Deployment" and f["metadata"]["name"] == "slmops-operator"]
    labels = operator["spec"]["template"]["metadata"]["labels"]
    assert monitors["slmops-operator"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("watched", [(), ("watchNamespaces={team}",)])
def test_what_a_pod_says_of_other_namespaces_is_believed_of_the_operators_alone(watched: tuple[str, ...]) -> None:
    """Else whoever may make a pod could write the numbers by which others' rollouts are judged."""
    found = render(*EVERYTHING, *watched)
    (operator,) = [f for f in found if f["kind"] == "Deployment" and f["metadata"]["name"] == "slmops-operator"]
    labels = operator["spec"]["template"]["metadata"]["labels"]
    own = {key: labels[key] for key in ("app.kubernetes.io/name", "app.kubernetes.io/instance")}
    (config,) = [f["data"]["prometheus.yml"] for f in found if "prometheus.yml" in f.get("data", {})]
    believed = [job for job in yaml.safe_load(config)["scrape_configs"] if job["honor_labels"]]
    assert len(believed) == 1
    for job in believed:
        assert [sd["namespaces"]["names"] for sd in job["kubernetes_sd_configs"]] == [["slmops-system"]]
        kept = {r["source_labels"][0]: r["regex"] for r in job["relabel_configs"] if r.get("action") == "keep"}
        prefix = "__meta_kubernetes_pod_label_"
        assert {prefix + re.sub("[./]", "_", key): value for key, value in own.items()}.items() <= kept.items()
    monitors = [
        f["spec"]
        for f in found
        if f["kind"] == "PodMonitor" and any(point["honorLabels"] for point in f["spec"]["podMetricsEndpoints"])
    ]
    assert [m["namespaceSelector"] for m in monitors] == [{"matchNames": ["slmops-system"]}]
    assert [m["selector"]["matchLabels"] for m in monitors] == [own]


def test_a_pod_that_anybody_may_make_does_not_fill_the_prometheus_of_all() -> None:
    """The operator's own grows with the deployments, and nobody else's pod is taken for it."""
    found = render(*EVERYTHING)
    (config,) = [f["data"]["prometheus.yml"] for f in found if "prometheus.yml" in f.get("data", {})]
    limits = {job["job_name"]: (job.get("sample_limit"), job.get("body_size_limit"), job.get("target_limit"))
              for job in yaml.safe_load(config)["scrape_configs"]}  # fmt: skip
    assert limits == {"slmops-objects": (50_000, "64MB", None), "slmops-operator": (None, None, None)}
    monitors = {f["metadata"]["name"]: f["spec"].get("sampleLimit") for f in found if f["kind"] == "PodMonitor"}
    assert monitors == {"slmops-objects": 50_000, "slmops-operator": None}
    told = re.search(r"up\s+to ([\d,]+) samples", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"))
    assert told
    assert int(told[1].replace(",", "")) == 50_000


def test_without_crds_a_release_in_namespaces_of_its_own_needs_no_rights_on_the_cluster() -> None:
    bound = render(*EVERYTHING, "watchNamespaces={team}", "crds.install=false")
    assert [f"{f['kind']}/{f['metadata']['name']}" for f in bound if not f["metadata"].get("namespace")] == []


def readme_command() -> list[str]:
    """The README's `helm upgrade --install`, its placeholders filled, as the arguments of `helm template`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^helm upgrade --install ((?:.*\\\n)*.*)", readme, re.MULTILINE)
    words = command.replace("\\\n", " ").replace("REGISTRY", "registry.example.com").replace("TAG", "v1").split()
    return ["template", *(word for word in words if word != "--create-namespace")]


def test_the_readmes_install_has_a_prometheus_that_is_asked_and_scrapes() -> None:
    """Without it every second revision would hold at its first step for ever."""
    done = helm(*readme_command())
    assert done.returncode == 0, done.stderr
    found = [f for f in yaml.safe_load_all(done.stdout) if f]
    asked = environment(found)["SLMOPS_PROMETHEUS_URL"]
    own = "http://slmops-prometheus." in asked
    assert asked
    assert [f for f in found if f["kind"] == ("Deployment" if own else "PodMonitor")
            and f["metadata"]["name"] == ("slmops-prometheus" if own else "slmops-objects")]  # fmt: skip


@pytest.mark.parametrize(("monitor", "warned"), [("false", True), ("true", False)])
def test_the_notes_say_where_a_prometheus_of_ones_own_may_scrape_nothing(
    monitor: str, warned: bool, tmp_path: Path
) -> None:
    chart = shutil.copytree(CHART, tmp_path / "slmops")  # `helm template` leaves NOTES.txt out, whatever it is told
    text = (chart / "templates/NOTES.txt").read_text(encoding="utf-8")
    (chart / "templates/notes.yaml").write_text("notes: |\n" + textwrap.indent(text, "  "), encoding="utf-8")
    flags = ("--set", "prometheus.url=http://jo:secret@prom:9090", "--set", f"podMonitor.enabled={monitor}")
    done = helm("template", "slmops", str(chart), "--show-only", "templates/notes.yaml", *flags)
    assert done.returncode == 0, done.stderr
    notes = yaml.safe_load(done.stdout)["notes"]
    assert "asks http://prom:9090." in notes
    assert ("podMonitor.enabled" in notes) == warned
