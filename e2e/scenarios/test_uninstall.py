"""helm uninstall with live objects hangs nothing; a new installation goes on where the old one stopped."""

import os
import shutil
import signal
import subprocess

import pytest

from kit import chart
from kit.kubectl import CURRENT, LOCAL, ROOT, Kubectl, wait_for
from kit.objects import TRAINING, deployment, finetune, quantize

pytestmark = pytest.mark.alone


def test_uninstall_with_live_objects(space: Kubectl, seeded: str, installed: Kubectl) -> None:
    space.apply(
        finetune("base", training={**TRAINING, "maxSteps": 30}, evaluation=None),
        quantize("onnx", "FineTuneJob", "base", "fp32"),
        deployment("shop", "onnx"),
    )
    space.wait_ready("modeldeployment", "shop", 300)
    space.apply(finetune("running", training={**TRAINING, "maxSteps": 100000}, evaluation=None))
    wait_for("it trains", lambda: space.list("pods", "slmops.dev/owner=running"), 60)

    chart.uninstall(installed)
    wait_for("the operator is gone", lambda: not installed.list("pods", "app.kubernetes.io/name=slmops-operator"), 60)
    assert space.get("modeldeployment", "shop"), "objects outlive the release"
    space.delete("finetunejob", "running")  # hangs if anything holds it
    wait_for("its pod is gone too", lambda: not space.list("pods", "slmops.dev/owner=running"), 90)

    revision = (space.get("modeldeployment", "shop") or {})["status"]["stable"]["revision"]
    pods = {p["metadata"]["uid"] for p in space.list("pods", "slmops.dev/owner=shop")}
    chart.install(installed, images=None if CURRENT else chart.local_images())
    space.wait_ready("modeldeployment", "shop", 60)
    assert (space.get("modeldeployment", "shop") or {})["status"]["stable"]["revision"] == revision
    assert {p["metadata"]["uid"] for p in space.list("pods", "slmops.dev/owner=shop")} == pods, "nothing was restarted"


def test_an_interrupted_upgrade_holds_up_nothing(installed: Kubectl) -> None:
    own = LOCAL / "bin/helm"
    helm = str(own) if own.exists() else shutil.which("helm") or "helm"
    words = ["upgrade", chart.RELEASE, str(ROOT / "charts/slmops"), "-n", chart.NAMESPACE, "--reuse-values", "--wait"]
    never = ["--set", "operator.resources.requests.memory=900Ti", "--set", "operator.resources.limits.memory=900Ti"]
    with subprocess.Popen([helm, *words, *never], env=installed.env, stdout=subprocess.DEVNULL) as process:
        wait_for("helm holds the release", lambda: chart.state(installed) == "pending-upgrade", 30)
        os.kill(process.pid, signal.SIGKILL)
    assert chart.state(installed) == "pending-upgrade"
    chart.install(installed, images=None if CURRENT else chart.local_images())
    assert chart.state(installed) == "deployed"
    operators = installed.list("pods", "app.kubernetes.io/name=slmops-operator")
    assert [pod["status"]["phase"] for pod in operators if "deletionTimestamp" not in pod["metadata"]] == ["Running"]
