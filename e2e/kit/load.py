"""A traffic pod in the cluster, read and stopped from here: requests go the way that users' requests go."""

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kit import pods
from kit.kubectl import Kubectl, KubectlError, wait_for

FILES = ("kit/__init__.py", "kit/traffic.py")
NAME = "traffic"
LIMITS = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
LIFE_SECONDS = 3600  # then it ends by itself, should nobody be left to stop it
STOP = "import os, signal; os.kill(1, signal.SIGTERM)"


@dataclass(frozen=True)
class Count:
    """Requests so far. `final`: the pod has stopped asking and this is all."""

    sent: int = 0
    lost: int = 0
    median_ms: float | None = None
    reasons: tuple[str, ...] = ()
    final: bool = False


class Load:
    """The pod `traffic` in kubectl's namespace."""

    def __init__(self, kube: Kubectl) -> None:
        self.kube = kube

    def start(self, image: str, url: str, model: str, prompts: list[str], *, clients: int, max_tokens: int) -> None:
        """A pod of an image that has Python; its code and questions come from ConfigMaps. Returns when it is applied.

        An older pod of this name goes first.
        """
        self.kube.delete("pod", NAME)
        command = ["python3", "-m", "kit.traffic", url, model, "/prompts/prompts.json", str(clients), str(max_tokens)]
        mounts = {
            "/code": pods.code_volume("traffic-code", FILES),
            "/prompts": {"configMap": {"name": "traffic-prompts"}},
        }
        env = {"PYTHONPATH": "/code", "PYTHONUNBUFFERED": "1"}
        made = pods.spec(image, command, env=env, mounts=mounts, resources=LIMITS)
        self.kube.apply(
            pods.code_map("traffic-code", FILES),
            pods.config_map("traffic-prompts", {"prompts.json": json.dumps(prompts)}),
            pods.pod(NAME, {**made, "activeDeadlineSeconds": LIFE_SECONDS}),
        )

    def count(self) -> Count:
        """The newest count; an empty one before the pod has any."""
        try:
            return parse(self.kube.run("logs", NAME, "--tail=2").splitlines())
        except KubectlError:  # no container yet
            return Count()

    def flows(self, requests: int, timeout: float = 60.0) -> None:
        """Wait until so many were sent. Raises TimedOut."""
        sent = self.count().sent
        wait_for(f"{requests} more requests", lambda: self.count().sent >= sent + requests, timeout)

    def stop(self) -> Count:
        """All of it. Raises TimedOut with the pod's log if it failed."""
        with contextlib.suppress(KubectlError):  # process 1 may be gone before this one says how it ended
            self.kube.run("exec", NAME, "--", "python3", "-c", STOP)
        count = parse(pods.finish(self.kube, NAME, 90))
        if not count.final:
            raise KubectlError(f"pod/{NAME} ended without its last count\n{pods.tail(self.kube, NAME)}")
        return count


def parse(lines: list[str]) -> Count:
    """The last whole line; an empty Count if there is none."""
    try:
        found: dict[str, Any] = pods.last_json(lines)
    except ValueError:
        return Count()
    return Count(**{**found, "reasons": tuple(found["reasons"])})


@contextmanager
def traffic(kube: Kubectl, image: str, url: str, model: str, prompts: list[str], *, clients: int = 2) -> Iterator[Load]:
    """The clients ask while the block runs. Raises AssertionError at its end if a request was lost."""
    load = Load(kube)
    load.start(image, url, model, prompts, clients=clients, max_tokens=40)
    load.flows(5)
    yield load
    count = load.stop()
    assert count.lost == 0, f"{count.lost} of {count.sent} requests were lost: {count.reasons}"
