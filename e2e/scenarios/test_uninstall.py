"""helm uninstall with live objects hangs nothing; a new installation goes on where the old one stopped."""

from kit import chart
from kit.kubectl import Kubectl, wait_for
from kit.objects import TRAINING, deployment, finetune, quantize


def test_uninstall_with_live_objects(space: Kubectl, seeded: str, images: dict[str, str], installed: Kubectl) -> None:
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
    chart.install(installed, images=images)
    space.wait_ready("modeldeployment", "shop", 60)
    assert (space.get("modeldeployment", "shop") or {})["status"]["stable"]["revision"] == revision
    assert {p["metadata"]["uid"] for p in space.list("pods", "slmops.dev/owner=shop")} == pods, "nothing was restarted"
