"""Pushes the scenarios' tiny base model and data into the installed registry, by a pod of the trainer image."""

from pathlib import Path

from kit import chart, pods
from kit.kubectl import Kubectl
from kit.objects import REGISTRY, STORE

SCRIPT = Path(__file__).resolve().parents[1] / "scenarios/seed_tiny.py"
NAMESPACE = "e2e-seed"


def seed(kube: Kubectl, image: str) -> str:
    """The root of the tiny artifacts, <root>/base:tiny and <root>/data:tiny, pushed anew. Raises TimedOut.

    `image`: the trainer's.
    """
    space = kube.within(NAMESPACE)
    made = pods.spec(
        image,
        ["python", "/files/seed_tiny.py", STORE],
        env={"SLMOPS_PLAIN_HTTP": REGISTRY},
        mounts={"/files": {"configMap": {"name": "seed"}}},
    )
    chart.fresh_namespace(space)
    space.apply(pods.config_map("seed", {"seed_tiny.py": SCRIPT.read_text(encoding="utf-8")}), pods.pod("seed", made))
    pods.finish(space, "seed", 180)
    space.delete("namespace", NAMESPACE, wait=False)
    return STORE
