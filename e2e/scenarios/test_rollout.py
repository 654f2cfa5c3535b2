"""Rollouts under continuous traffic on the node: no request is lost, whatever happens to operator or candidate."""

from collections.abc import Iterator
from typing import Any

import pytest

from kit import chart
from kit.kubectl import Kubectl, wait_for
from kit.objects import TRAINING, deployment, describe, finetune, quantize
from kit.traffic import Traffic

PROMPTS = ["I want a tiny red box", "blue ring please, huge one", "send me the green cone, small"]
STEPS = [{"weight": 20, "pauseSeconds": 4}, {"weight": 50, "pauseSeconds": 4}]
ANALYSIS = {
    "intervalSeconds": 2,
    "windowSeconds": 20,
    "minSamples": 5,
    "passes": 2,
    "failureLimit": 1,
    "metrics": [{"name": "errors", "builtin": "errorRate", "max": 0.05}],
}


@pytest.fixture(scope="module")
def shop(installed: Kubectl, seeded: str) -> Iterator[Kubectl]:
    """A namespace with a stable ModelDeployment `shop` and two more models to roll to."""
    kube = installed.within("e2e-rollout")
    kube.delete("namespace", "e2e-rollout")
    kube.apply(chart.namespace("e2e-rollout"))
    kube.apply(
        finetune("base", training={**TRAINING, "maxSteps": 30}, evaluation=None),
        quantize("one", "FineTuneJob", "base", "fp32"),
        quantize("two", "FineTuneJob", "base", "int4"),
        quantize("three", "FineTuneJob", "base", "int4", blockSize=16),
        deployment("shop", "one", rollout={"steps": STEPS, "analysis": ANALYSIS, "scaleDownDelaySeconds": 3}),
    )
    for name in ("one", "two", "three"):
        kube.wait_ready("quantizedmodel", name, 300)
    kube.wait_ready("modeldeployment", "shop", 180)
    yield kube
    kube.delete("namespace", "e2e-rollout", wait=False)


def status(kube: Kubectl) -> dict[str, Any]:
    found: dict[str, Any] = (kube.get("modeldeployment", "shop") or {})["status"]
    return found


def roll_to(kube: Kubectl, model: str, **rollout: object) -> None:
    """As a GitOps repo would: the model, and the rollout where it differs."""
    spec: dict[str, object] = {"model": {"ref": {"kind": "QuantizedModel", "name": model}}}
    kube.patch("modeldeployment", "shop", {"spec": {**spec, **({"rollout": rollout} if rollout else {})}})


def serves(kube: Kubectl, model: str, timeout: float = 180) -> None:
    """Wait until `model` is stable and nothing else is on its way."""

    def probe() -> bool:
        now = status(kube)
        return bool(now["stable"]["source"] == f"QuantizedModel/{model}" and not now.get("candidate"))

    wait_for(f"{model} is stable", probe, timeout)
    kube.wait_ready("modeldeployment", "shop", 60)


def phase_is(kube: Kubectl, *phases: str, timeout: float = 120) -> dict[str, Any]:
    return wait_for(f"phase {phases}", lambda: (s := status(kube))["phase"] in phases and s, timeout)


def test_operator_killed_at_every_phase(shop: Kubectl) -> None:
    system = shop.within(chart.NAMESPACE)

    def kill_operator() -> None:
        system.run("delete", "pod", "-l", "app.kubernetes.io/name=slmops-operator", "--grace-period=0", "--force")

    with shop.port_forward("service/shop", 8000) as url, Traffic(f"{url}/v1", "shop", PROMPTS) as traffic:
        wait_for("traffic flows", lambda: traffic.tally.sent > 5, 30)
        roll_to(shop, "two")
        seen: set[tuple[str, int]] = set()

        def moved_on() -> bool:
            now = status(shop)
            here = (now["rollout"]["phase"], now["rollout"]["step"])
            if here not in seen and now.get("candidate"):
                seen.add(here)
                kill_operator()
            return bool(now["stable"]["source"] == "QuantizedModel/two" and not now.get("candidate"))

        wait_for("the rollout ends", moved_on, 240)
        assert len(seen) >= 3, f"killed only in {seen}"
        serves(shop, "two")
    assert traffic.tally.lost == 0, traffic.tally


def test_slow_candidate_is_rolled_back(shop: Kubectl) -> None:
    analysis = {**ANALYSIS, "metrics": [{"name": "p95", "builtin": "latencyP95", "max": 0.0001}]}
    before = status(shop)["stable"]["revision"]
    with shop.port_forward("service/shop", 8000) as url, Traffic(f"{url}/v1", "shop", PROMPTS) as traffic:
        roll_to(shop, "three", analysis=analysis, steps=STEPS)
        now = phase_is(shop, "RolledBack", timeout=180)
        assert now["stable"]["revision"] == before
        wait_for("the candidate has no weight", lambda: not status(shop).get("weight"), 30)
        stalled = shop.condition("modeldeployment", "shop", "Stalled") or {}
        assert stalled["status"] == "True", describe(shop)
        assert "p95" in stalled["message"], stalled
        assert (shop.condition("modeldeployment", "shop", "Available") or {})["status"] == "True"
        roll_to(shop, now["stable"]["source"].split("/")[1], analysis=ANALYSIS, steps=STEPS)
        shop.wait_ready("modeldeployment", "shop", 60)
    assert traffic.tally.sent > 20
    assert traffic.tally.lost == 0, traffic.tally


def test_candidate_that_never_starts_is_rolled_back(shop: Kubectl) -> None:
    before = status(shop)["stable"]
    with shop.port_forward("service/shop", 8000) as url, Traffic(f"{url}/v1", "shop", PROMPTS) as traffic:
        shop.patch(
            "modeldeployment",
            "shop",
            {"spec": {"engine": {"args": ["--no-such-flag"]}, "rollout": {"progressDeadlineSeconds": 20}}},
        )
        phase_is(shop, "RolledBack", timeout=120)
        assert status(shop)["stable"]["revision"] == before["revision"]
        shop.patch(
            "modeldeployment", "shop", {"spec": {"engine": {"args": None}, "rollout": {"progressDeadlineSeconds": 600}}}
        )
        shop.wait_ready("modeldeployment", "shop", 60)
    assert traffic.tally.lost == 0, traffic.tally


def test_third_revision_supersedes_and_revert_comes_home(shop: Kubectl) -> None:
    long = [{"weight": 30, "pauseSeconds": 600}]
    home = status(shop)["stable"]["source"].split("/")[1]
    second, third = [m for m in ("one", "two", "three") if m != home]
    with shop.port_forward("service/shop", 8000) as url, Traffic(f"{url}/v1", "shop", PROMPTS) as traffic:
        roll_to(shop, second, steps=long)
        wait_for("the second has traffic", lambda: status(shop).get("weight") == 30, 120)
        roll_to(shop, third)

        def third_has_traffic() -> bool:
            now = status(shop)
            return (now.get("candidate") or {}).get("source") == f"QuantizedModel/{third}" and now.get("weight") == 30

        wait_for("the third has traffic", third_has_traffic, 120)
        assert status(shop)["stable"]["source"] == f"QuantizedModel/{home}"
        roll_to(shop, home, steps=STEPS)
        serves(shop, home, timeout=90)
    assert traffic.tally.lost == 0, traffic.tally


def test_scale_and_delete(shop: Kubectl) -> None:
    shop.run("scale", "modeldeployment/shop", "--replicas=2")
    wait_for("two ready pods", lambda: status(shop)["readyReplicas"] == 2, 120)
    shop.delete("modeldeployment", "shop")
    wait_for(
        "all its children are gone", lambda: not shop.list("deployments,services,pods", "slmops.dev/owner=shop"), 120
    )
