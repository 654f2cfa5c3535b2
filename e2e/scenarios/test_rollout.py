"""Rollouts under continuous traffic on the node: no request is lost, whatever happens to operator or candidate."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from kit import chart
from kit.kubectl import Kubectl, wait_for
from kit.load import Load, traffic
from kit.objects import TRAINING, deployment, describe, finetune, quantize

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
    chart.fresh_namespace(kube)
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
    return wait_for(f"phase {phases}", lambda: s if (s := status(kube))["phase"] in phases else None, timeout)


@pytest.fixture
def requests(shop: Kubectl, images: dict[str, str]) -> AbstractContextManager[Load]:
    """Continuous requests while its block runs; fails at the end if one was lost."""
    return traffic(shop, images["server"], status(shop)["endpoint"], "shop", PROMPTS)


PHASES = [("Preparing", 0), ("Step", 0), ("Step", 1), ("Promoting", 1), ("Draining", 0)]


def test_operator_killed_at_every_phase(shop: Kubectl, requests: AbstractContextManager[Load]) -> None:
    system = shop.within(chart.NAMESPACE)
    pods = ("pod", "-l", "app.kubernetes.io/name=slmops-operator")
    left = list(PHASES)

    def ended() -> bool:
        now = status(shop)
        phase, step = now["rollout"]["phase"], now["rollout"]["step"]
        here = next((each for each in left if each[0] == phase and (each[1] == step or phase != "Step")), None)
        if here:
            left.remove(here)
            system.run("delete", *pods, "--grace-period=0", "--force")
        return bool(phase == "Stable" and now["stable"]["source"] == "QuantizedModel/two")

    with requests:
        roll_to(shop, "two")
        wait_for("the rollout ends", ended, 240, every=0.1)
        serves(shop, "two")
    assert not left, f"never seen: {left}"


def candidate_pods(kube: Kubectl, revision: str) -> int:
    """Pods that the candidate's Deployment is to have."""
    found = kube.list("deployments", f"slmops.dev/owner=shop,slmops.dev/revision={revision}")
    return int(found[0]["spec"]["replicas"]) if found else 0


def test_slow_candidate_is_rolled_back_weight_first(shop: Kubectl, requests: AbstractContextManager[Load]) -> None:
    analysis = {**ANALYSIS, "metrics": [{"name": "p95", "builtin": "latencyP95", "max": 0.0001}]}
    before = status(shop)["stable"]["revision"]
    history: list[tuple[int, int]] = []  # (weight, pods) of the candidate: pods are read after the weight

    def gone() -> bool:
        now = status(shop)
        revision = (now.get("candidate") or {}).get("revision", before)
        if revision != before:
            history.append((now.get("weight") or 0, candidate_pods(shop, revision)))
        return bool(now["rollout"]["phase"] == "RolledBack" and history[-1] == (0, 0))

    with requests as load:
        roll_to(shop, "three", analysis=analysis, steps=STEPS)
        wait_for("the candidate is rolled back and its pods are gone", gone, 240, every=0.1)
        fell = max(index for index, (weight, _) in enumerate(history) if weight)
        assert history[fell][1] > 0, f"pods went before the weight: {history}"
        assert history[fell + 1] == (0, history[fell][1]), f"weight and pods went at once: {history}"
        now = status(shop)
        assert now["stable"]["revision"] == before
        stalled = shop.condition("modeldeployment", "shop", "Stalled") or {}
        assert stalled["status"] == "True", describe(shop)
        assert "p95" in stalled["message"], stalled
        assert (shop.condition("modeldeployment", "shop", "Available") or {})["status"] == "True"
        load.flows(20)
        roll_to(shop, now["stable"]["source"].split("/")[1], analysis=ANALYSIS, steps=STEPS)
        shop.wait_ready("modeldeployment", "shop", 60)


def test_candidate_that_refuses_requests_is_rolled_back(shop: Kubectl, images: dict[str, str]) -> None:
    """It has room for one at a time; the router has the stable revision answer what it refuses."""
    before = status(shop)["stable"]
    rollout = {"analysis": {**ANALYSIS, "failureLimit": 0}, "steps": STEPS}
    small = {"args": ["--slots", "1", "--max-queue", "0"]}
    with traffic(shop, images["server"], status(shop)["endpoint"], "shop", PROMPTS, clients=8) as load:
        shop.patch("modeldeployment", "shop", {"spec": {"engine": small, "rollout": rollout}})
        phase_is(shop, "RolledBack", timeout=120)
        stalled = shop.condition("modeldeployment", "shop", "Stalled") or {}
        assert stalled["status"] == "True", describe(shop)
        assert "errors" in stalled["message"], stalled
        assert status(shop)["stable"]["revision"] == before["revision"]
        load.flows(20)
        spec = {"engine": {"args": None}, "rollout": {"analysis": ANALYSIS}}
        shop.patch("modeldeployment", "shop", {"spec": spec})
        shop.wait_ready("modeldeployment", "shop", 60)


def test_candidate_that_never_starts_is_rolled_back(shop: Kubectl, requests: AbstractContextManager[Load]) -> None:
    before = status(shop)["stable"]
    with requests as load:
        shop.patch(
            "modeldeployment",
            "shop",
            {"spec": {"engine": {"args": ["--no-such-flag"]}, "rollout": {"progressDeadlineSeconds": 20}}},
        )
        phase_is(shop, "RolledBack", timeout=120)
        assert status(shop)["stable"]["revision"] == before["revision"]
        load.flows(20)
        shop.patch(
            "modeldeployment", "shop", {"spec": {"engine": {"args": None}, "rollout": {"progressDeadlineSeconds": 600}}}
        )
        shop.wait_ready("modeldeployment", "shop", 60)


def test_third_revision_supersedes_and_revert_comes_home(shop: Kubectl, requests: AbstractContextManager[Load]) -> None:
    long = [{"weight": 30, "pauseSeconds": 600}]
    home = status(shop)["stable"]["source"].split("/")[1]
    second, third = [m for m in ("one", "two", "three") if m != home]
    with requests:
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


def test_scale_and_delete(shop: Kubectl) -> None:
    shop.run("scale", "modeldeployment/shop", "--replicas=2")
    wait_for("two ready pods", lambda: status(shop)["readyReplicas"] == 2, 120)
    shop.delete("modeldeployment", "shop")
    wait_for(
        "all its children are gone", lambda: not shop.list("deployments,services,pods", "slmops.dev/owner=shop"), 120
    )
