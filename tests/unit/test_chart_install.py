"""What `make install` gives to helm, and what it does with what an interrupted helm left."""

import json
import sys
from pathlib import Path

import pytest

from kit import alone, chart, kubectl
from kit.kubectl import Kubectl, KubectlError, Object


def test_no_file_of_values_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VALUES", raising=False)
    assert chart.values_flags() == []
    monkeypatch.setenv("VALUES", "")  # as the Makefile exports it
    assert chart.values_flags() == []


def test_the_users_file_of_values_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "images.yaml"
    file.write_text("images: {}")
    monkeypatch.setenv("VALUES", str(file))
    assert chart.values_flags() == ["--values", str(file)]


def test_a_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALUES", "no/such.yaml")
    with pytest.raises(KubectlError, match=r"no/such\.yaml"):
        chart.values_flags()


HELM = """#!/bin/sh
echo "$1" >> {log}
case "$*" in *=lent*) echo lent >> {log};; esac
case "$*" in *=broken*) exit 1;; esac
if [ "$1" = status ]; then cat {status}; fi
"""


@pytest.fixture
def helm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for helm: the file `calls` beside it has what was asked of it, `status` what it says of the release."""
    program = tmp_path / "bin" / "helm"
    program.parent.mkdir()
    program.write_text(HELM.format(log=tmp_path / "calls", status=tmp_path / "status"))
    program.chmod(0o755)
    monkeypatch.setattr(chart, "LOCAL", tmp_path)
    monkeypatch.setattr(alone, "LOCK", tmp_path / "demo.lock")
    return tmp_path


@pytest.mark.parametrize(
    ("status", "calls"),
    [
        ("deployed", []),
        ("failed", []),
        ("pending-install", ["uninstall"]),
        ("uninstalling", ["uninstall"]),  # helm upgrades nothing that has no deployed revision any more
        ("pending-upgrade", ["rollback"]),
        ("pending-rollback", ["rollback"]),
    ],
)
def test_what_an_interrupted_helm_left_is_ended(helm: Path, status: str, calls: list[str]) -> None:
    (helm / "status").write_text(json.dumps({"info": {"status": status}}))
    chart.settle(Kubectl())
    assert (helm / "calls").read_text().split() == ["status", *calls]


def test_uninstalling_twice_is_fine(
    helm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (helm / "bin" / "helm").write_text("#!/bin/sh\necho 'Error: release: not found' >&2; exit 1\n")
    monkeypatch.setattr(sys, "argv", ["chart", "uninstall"])
    assert chart.main() == 0
    assert "not installed" in capsys.readouterr().out


def test_a_failure_says_how_to_look(
    helm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (helm / "bin" / "helm").write_text("#!/bin/sh\necho 'Error: deadline exceeded' >&2; exit 1\n")
    monkeypatch.setattr(sys, "argv", ["chart", "uninstall"])
    monkeypatch.setattr(kubectl, "CURRENT", False)
    assert chart.main() == 1
    said = capsys.readouterr().err
    assert "deadline exceeded" in said
    assert "export KUBECONFIG=$PWD/.local/kubeconfig PATH=$PWD/.local/bin:$PATH" in said
    assert "kubectl -n slmops-system get pods,events" in said


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("", 1, "VALUES=images.yaml"),
        ("failed", 1, "VALUES=images.yaml"),
        ("deployed", 0, "stays as it is"),
    ],
)
def test_images_that_nobody_published_are_not_installed(
    helm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], status: str, code: int, said: str
) -> None:
    """On the user's cluster, without VALUES: only what is there already is used."""
    monkeypatch.setattr(sys, "argv", ["chart", "install"])
    monkeypatch.setattr(chart, "CURRENT", True)
    monkeypatch.delenv("VALUES", raising=False)
    (helm / "status").write_text(json.dumps({"info": {"status": status}}))
    assert chart.main() == code
    out, err = capfd.readouterr()
    assert said in out + err
    assert "kubectl" not in err, "there is nothing to look at"
    assert "upgrade" not in (helm / "calls").read_text()


def test_no_image_built_yet_leads_to_no_pods(
    helm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chart", "install"])
    monkeypatch.setattr(chart, "CURRENT", False)
    assert chart.main() == 1
    assert capsys.readouterr().err == "Failed: No images are built yet: make up images\n"


@pytest.mark.parametrize(("current", "after"), [(True, ["status", "upgrade"]), (False, [])])
def test_what_the_scenarios_set_is_taken_back_when_one_fails(
    helm: Path, monkeypatch: pytest.MonkeyPatch, current: bool, after: list[str]
) -> None:
    monkeypatch.setattr(chart, "CURRENT", current)
    (helm / "status").write_text(json.dumps({"info": {"status": "deployed"}}))

    def fail() -> None:
        with chart.lent(Cluster(), "hfEndpoint=lent", images={"operator": "o:1"}):
            assert (helm / "calls").read_text().split() == ["status", "upgrade", "lent"]
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert (helm / "calls").read_text().split()[3:] == after


def test_what_the_scenarios_set_is_taken_back_when_it_could_not_be_set_wholly(
    helm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chart, "CURRENT", True)
    (helm / "status").write_text(json.dumps({"info": {"status": "deployed"}}))
    with pytest.raises(KubectlError), chart.lent(Cluster(), "hfEndpoint=lent", "x=broken", images={"operator": "o:1"}):
        pass
    assert (helm / "calls").read_text().split() == ["status", "upgrade", "lent", "status", "upgrade"]


class Cluster(Kubectl):
    """A cluster that has the namespace, perhaps on its way out; `done` is what was asked of it."""

    def __init__(self, **metadata: str) -> None:
        super().__init__()
        self.metadata, self.done = metadata, list[str]()

    def get(self, kind: str, name: str) -> Object | None:
        return {"kind": kind, "metadata": {"name": name, **self.metadata}} if self.metadata else None

    def delete(self, kind: str, name: str, *, wait: bool = True) -> None:
        assert wait
        self.done.append(f"delete {kind}")

    def apply(self, *objects: Object) -> None:
        self.done += [f"apply {obj['kind']}" for obj in objects]


@pytest.mark.parametrize(
    ("metadata", "done"),
    [
        ({}, ["apply Namespace"]),
        ({"uid": "1"}, ["apply Namespace"]),
        ({"uid": "1", "deletionTimestamp": "2026-01-01T00:00:00Z"}, ["delete namespace", "apply Namespace"]),
    ],
)
def test_a_namespace_that_is_being_deleted_is_waited_for(
    helm: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], done: list[str]
) -> None:
    monkeypatch.delenv("VALUES", raising=False)
    (helm / "status").write_text(json.dumps({"info": {"status": "deployed"}}))
    cluster = Cluster(**metadata)
    chart.install(cluster, images={})
    assert cluster.done == done
    assert (helm / "calls").read_text().split() == ["status", "upgrade"]


class Lender(Kubectl):
    """A cluster by what lies in it, namespace/kind/name -> object; `done` is what is asked of kubectl's namespace."""

    def __init__(self, there: dict[str, Object], namespace: str = "demo") -> None:
        super().__init__(namespace)
        self.there, self.done, self.applied = there, list[str](), list[Object]()

    def within(self, namespace: str) -> "Lender":
        return Lender(self.there, namespace)

    def get(self, kind: str, name: str) -> Object | None:
        return self.there.get(f"{self.namespace}/{kind}/{name}")

    def delete(self, kind: str, name: str, *, wait: bool = True) -> None:
        assert wait
        self.done.append(f"delete {kind}/{name}")

    def apply(self, *objects: Object) -> None:
        self.done += [f"apply {obj['kind']}/{obj['metadata']['name']}" for obj in objects]
        self.applied += objects


def operator(**pod: object) -> dict[str, Object]:
    return {"slmops-system/deployment/slmops-operator": {"spec": {"template": {"spec": {"containers": [], **pod}}}}}


def test_pods_in_a_namespace_made_for_them_pull_with_the_operators_secrets() -> None:
    kept = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson", "data": {"x": "eA=="}}
    named = [{"name": "mine"}, {"name": "gone"}]
    metadata = {"name": "mine", "namespace": "slmops-system", "uid": "1", "resourceVersion": "7"}
    kube = Lender(operator(imagePullSecrets=named) | {"slmops-system/secret/mine": {**kept, "metadata": metadata}})
    chart.fresh_namespace(kube)
    made = ["apply Namespace/demo", "apply Secret/mine", "apply ServiceAccount/default"]
    assert kube.done == ["delete namespace/demo", *made]
    assert kube.applied[1] == {**kept, "metadata": {"name": "mine"}}
    assert kube.applied[2]["imagePullSecrets"] == named


@pytest.mark.parametrize("there", [{}, operator()])
def test_without_pull_secrets_a_namespace_has_nothing_of_ours(there: dict[str, Object]) -> None:
    kube = Lender(there)
    chart.fresh_namespace(kube)
    assert kube.done == ["delete namespace/demo", "apply Namespace/demo"]
