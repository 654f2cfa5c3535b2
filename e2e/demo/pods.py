"""The demo's own pods, seeding and measuring: their code lies in a ConfigMap beside the image's own."""

from kit import pods
from kit.kubectl import Object

CODE = "demo-code"
FILES = ("demo/__init__.py", "demo/phrases.py", "demo/task.py", "demo/seed.py", "demo/bench.py")
LIMITS = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}


def code() -> Object:
    """The ConfigMap with FILES."""
    return pods.code_map(CODE, FILES)


def pod(name: str, image: str, module: str, *args: str, env: dict[str, str]) -> Object:
    """A pod that runs `python3 -m module args`."""
    made = pods.spec(
        image,
        ["python3", "-m", module, *args],
        env={"PYTHONPATH": "/opt/slmops:/code", "PYTHONUNBUFFERED": "1", **env},
        mounts={"/code": pods.code_volume(CODE, FILES)},
        resources=LIMITS,
    )
    return pods.pod(name, made)
