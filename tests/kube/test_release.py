"""What helm makes of the chart on a real API server: the way back, and who may install it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.kube.api import Api
from tests.kube.conftest import ROOT
from tests.kube.proxy import Proxy
from tests.kube.test_rbac import V1, Granted, bound, rendered

from localkube import tools
from slmops.cluster.kinds import PLACES

KEY = "slmops-router-key"


class HelmError(Exception):
    """What helm says."""


class Release:
    """A release in a namespace of its own, without the cluster's part: the CRDs are there."""

    def __init__(self, proxy: Proxy, namespace: str, folder: Path) -> None:
        tools.ensure(["helm"])
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": proxy.url}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        (folder / "kubeconfig").write_text(yaml.safe_dump(config))
        self.env = {**os.environ, "KUBECONFIG": str(folder / "kubeconfig"), "HOME": str(folder)}
        self.namespace = namespace

    def helm(self, *words: str) -> None:
        command = [str(tools.path("helm")), *words, "--namespace", self.namespace]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise HelmError(done.stderr)

    def upgrade(self, *sets: str) -> None:
        own = ("crds.install=false", f"watchNamespaces={{{self.namespace}}}", *sets)
        flags = [part for item in own for part in ("--set", item)]
        self.helm("upgrade", "--install", "slmops", str(ROOT / "charts/slmops"), *flags)


@pytest.fixture
def release(api: Api, proxy: Proxy, tmp_path: Path) -> Release:
    return Release(proxy, api.namespace, tmp_path)


def test_from_a_key_of_ones_own_there_is_a_way_back(api: Api, release: Release) -> None:
    """Helm rolls nothing back to what it kept and the release no longer has: the operator would stay down."""

    def key_of_the_operator() -> str:
        pod = api.need("Deployment", "slmops-operator")["spec"]["template"]["spec"]
        (found,) = [entry for entry in pod["containers"][0]["env"] if entry["name"] == "SLMOPS_ROUTER_KEY"]
        return str(found["valueFrom"]["secretKeyRef"]["name"])

    release.upgrade()
    made = api.need("Secret", KEY)["data"]
    release.upgrade("router.existingSecret=ruoter-key")
    assert key_of_the_operator() == "ruoter-key"
    release.helm("rollback", "slmops")
    assert key_of_the_operator() == KEY
    assert api.need("Secret", KEY)["data"] == made


def test_where_helm_has_no_way_back_the_former_values_lead_on(api: Api, release: Release) -> None:
    """As docs/install.md says; when helm learns it, the docs may forget it."""
    release.upgrade()
    release.upgrade("registry.enabled=false", "store.url=oci://elsewhere")
    with pytest.raises(HelmError, match=r"original object PersistentVolumeClaim .* not found"):
        release.helm("rollback", "slmops")
    assert api.get("Deployment", "slmops-registry") is None
    release.upgrade()
    assert api.need("Deployment", "slmops-registry")


def test_a_key_that_others_made_is_left_to_them(api: Api, release: Release) -> None:
    api.create("Secret", KEY, stringData={"key": "k" * 32})
    release.upgrade(f"router.existingSecret={KEY}")
    release.helm("uninstall", "slmops")
    assert "labels" not in api.need("Secret", KEY)["metadata"]


@pytest.fixture
def granted(api: Api) -> Iterator[Granted]:
    found = Granted(api)
    yield found
    found.take()


def test_who_has_admin_in_a_namespace_installs_there_with_what_the_docs_add(
    api: Api, proxy: Proxy, release: Release, granted: Granted
) -> None:
    """A Role hands on only what its maker has. Nobody puts the roles into the built-in `admin` here."""
    roles = rendered(str(tools.path("helm")))
    people = [role for role in roles if role["metadata"]["name"].endswith(("-view", "-edit"))]
    built_in = [f"system:aggregate-to-{role}" for role in ("view", "edit", "admin")]
    names = [*built_in, *(role["metadata"]["name"] for role in people)]
    granted.give([*people, *(bound(name, api.namespace) for name in names)])
    proxy.user = "somebody"
    with pytest.raises(HelmError, match=r"(?s)attempting to grant RBAC permissions not currently held.*slmops\.dev"):
        release.upgrade()
    added = [
        {"apiGroups": ["slmops.dev"], "resources": [f"{place.plural}/{part}"], "verbs": [verb]}
        for place in PLACES.values() if place.ours
        for part, verb in (("status", "patch"), ("finalizers", "update"))
    ]  # fmt: skip
    role = {**V1, "kind": "Role", "metadata": {"name": "more", "namespace": api.namespace}, "rules": added}
    granted.give([role, bound("more", api.namespace, "Role")])
    release.upgrade()
