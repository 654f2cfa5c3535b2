"""Pod Security `restricted` on the chart's namespace and on a user's; the NetworkPolicies meet the pods they mean.

The local node's network enforces no NetworkPolicy: what can be proven here is whom each one selects, and its ports.
"""

import json
from collections.abc import Iterator

import pytest

from kit import chart, pods
from kit.kubectl import Kubectl, KubectlError, Object
from kit.objects import TRAINING, deployment, finetune, quantize

LEVEL = "pod-security.kubernetes.io/enforce"


@pytest.fixture(scope="module")
def busy(installed: Kubectl, seeded: str) -> Iterator[Kubectl]:
    """A user's namespace with workers, a server and a router."""
    space = installed.within("e2e-security")
    chart.fresh_namespace(space)
    space.apply(
        finetune("base", training={**TRAINING, "maxSteps": 5}, evaluation=None),
        quantize("onnx", "FineTuneJob", "base", "int4"),
        deployment("shop", "onnx"),
    )
    space.wait_ready("modeldeployment", "shop", 300)
    yield space
    space.delete("namespace", space.namespace, wait=False)


def violations(kube: Kubectl) -> str:
    """What the API server says of the pods that run when the level is set anew; nothing is changed."""
    return kube.warnings(
        "label", "namespace", kube.namespace, f"{LEVEL}=restricted", f"{LEVEL}-version=v1.31", "--dry-run=server"
    )


def test_everything_is_admitted_where_restricted_is_enforced(busy: Kubectl, installed: Kubectl) -> None:
    roles = {pod["metadata"]["labels"].get("slmops.dev/role") for pod in busy.list("pods")}
    assert roles == {"worker", "server", "router"}
    for kube in (installed, busy):
        labels = (kube.get("namespace", kube.namespace) or {})["metadata"]["labels"]
        assert labels[LEVEL] == "restricted"
        refused = [event["message"] for event in kube.list("events") if "violates PodSecurity" in event["message"]]
        assert not refused, refused
        assert "violate" not in violations(kube)


def test_the_question_would_find_a_pod_that_is_not_restricted(space: Kubectl, images: dict[str, str]) -> None:
    space.run("label", "namespace", space.namespace, f"{LEVEL}-", "pod-security.kubernetes.io/warn-")
    pod = pods.spec(images["operator"], ["true"], securityContext={"runAsUser": 0, "runAsNonRoot": False})
    space.apply(pods.pod("root", pod))
    assert "violate" in violations(space)


def test_users_cannot_loosen_it(space: Kubectl) -> None:
    for pod in ({"securityContext": {"privileged": True}}, {"hostNetwork": True}, {"serviceAccountName": "admin"}):
        with pytest.raises(KubectlError, match="unknown field"):
            space.apply(finetune("loose", pod=pod))


def test_no_pod_of_ours_has_a_token_but_the_operator(busy: Kubectl, installed: Kubectl) -> None:
    def tokens(pod: Object) -> bool:
        return "kube-api-access" in json.dumps(pod["spec"].get("volumes", []))

    assert not [pod["metadata"]["name"] for pod in busy.list("pods") if tokens(pod)]
    holders = [pod["metadata"]["labels"]["app.kubernetes.io/name"] for pod in installed.list("pods") if tokens(pod)]
    assert set(holders) <= {"slmops-operator", "slmops-prometheus"}, holders
    assert "slmops-operator" in holders


def test_each_network_policy_selects_its_pod_and_names_its_ports(installed: Kubectl) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in installed.list("networkpolicies")}
    prometheus = f"{chart.RELEASE}-prometheus"
    bundled = [prometheus] if installed.get("deployment", prometheus) else []
    assert set(policies) == {f"{chart.RELEASE}-operator", f"{chart.RELEASE}-registry", *bundled}
    for name, policy in policies.items():
        selector = ",".join(f"{key}={value}" for key, value in policy["podSelector"]["matchLabels"].items())
        selected = installed.list("pods", selector)
        assert [pod["metadata"]["name"].rsplit("-", 2)[0] for pod in selected] == [name]
        ports = [port for c in selected[0]["spec"]["containers"] for port in c.get("ports", [])]
        listens = {port["containerPort"] for port in ports if port["name"] != "probes"}  # which the node alone asks
        allowed = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        assert allowed == listens, f"{name}: open {allowed}, in the pod {listens}"
    assert policies[f"{chart.RELEASE}-registry"].get("egress", []) == []
    assert "Egress" in policies[f"{chart.RELEASE}-registry"]["policyTypes"]
