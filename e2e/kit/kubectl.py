"""kubectl, as users have it: every call is a process, every object plain JSON."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / ".local"

Object = dict[str, Any]
T = TypeVar("T")


class KubectlError(Exception):
    """kubectl said no; the message is its own."""


class TimedOut(AssertionError):  # noqa: N818  # reads as what happened
    """A condition did not come true in time."""


def wait_for(what: str, probe: Callable[[], T | None], timeout: float = 60.0, every: float = 0.5) -> T:
    """The first true value of `probe()`. Raises TimedOut naming `what` and the last value after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimedOut(f"{what}: not within {timeout:.0f} s; last seen: {value!r}")
        time.sleep(every)


class Kubectl:
    """kubectl in one namespace of one cluster; `current=True` takes the user's own kube context."""

    def __init__(self, namespace: str = "default", *, current: bool = False) -> None:
        self.namespace, self.current = namespace, current
        own = LOCAL / "bin" / "kubectl"
        self.program = str(own) if own.exists() and not current else "kubectl"
        self.env = dict(os.environ) if current else {**os.environ, "KUBECONFIG": str(LOCAL / "kubeconfig")}

    def within(self, namespace: str) -> "Kubectl":
        """The same cluster, another namespace."""
        return Kubectl(namespace, current=self.current)

    def run(self, *args: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        """Standard output of `kubectl -n <namespace> <args>`. Raises KubectlError."""
        done = subprocess.run(
            [self.program, "-n", self.namespace, *args],
            input=stdin,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise KubectlError(done.stderr.strip() or done.stdout.strip())
        return done.stdout

    def apply(self, *objects: Object) -> None:
        """Apply, as `kubectl apply --server-side` does. Raises KubectlError."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.run("apply", "--server-side", "--field-manager=user", "-f", "-", stdin=text)

    def get(self, kind: str, name: str) -> Object | None:
        """The object, or None."""
        text = self.run("get", kind, name, "-o", "json", "--ignore-not-found")
        found: Object | None = json.loads(text) if text.strip() else None
        return found

    def list(self, kind: str, selector: str = "") -> list[Object]:
        """Objects of `kind` that match the label selector."""
        items: list[Object] = json.loads(self.run("get", kind, "-o", "json", "-l", selector))["items"]
        return items

    def patch(self, kind: str, name: str, patch: Object, *, subresource: str = "") -> None:
        """A merge patch."""
        extra = [f"--subresource={subresource}"] if subresource else []
        self.run("patch", kind, name, "--type=merge", "-p", json.dumps(patch), *extra)

    def delete(self, kind: str, name: str, *, wait: bool = True) -> None:
        """Delete; an absent object is fine."""
        self.run("delete", kind, name, "--ignore-not-found", f"--wait={str(wait).lower()}", timeout=180)

    def condition(self, kind: str, name: str, condition: str) -> Object | None:
        """One condition of an object, or None."""
        conditions = ((self.get(kind, name) or {}).get("status") or {}).get("conditions") or []
        return next((c for c in conditions if c["type"] == condition), None)

    def wait_ready(self, kind: str, name: str, timeout: float) -> Object:
        """The object once Ready=True for its generation. Raises TimedOut, at once when it is Stalled."""

        def probe() -> Object | None:
            found = self.get(kind, name)
            status = (found or {}).get("status") or {}
            conditions = {c["type"]: c for c in status.get("conditions") or []}
            fresh = found is not None and status.get("observedGeneration") == found["metadata"]["generation"]
            if fresh and conditions.get("Stalled", {}).get("status") == "True":
                raise TimedOut(f"{kind}/{name} is Stalled: {conditions['Stalled']}")
            return found if fresh and conditions.get("Ready", {}).get("status") == "True" else None

        return wait_for(f"{kind}/{name} Ready", probe, timeout)

    @contextmanager
    def port_forward(self, target: str, port: int) -> Iterator[str]:
        """`http://127.0.0.1:<free port>` leading to `target` (for example service/assistant) while the block runs."""
        with subprocess.Popen(
            [self.program, "-n", self.namespace, "port-forward", target, f":{port}"],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()  # Forwarding from 127.0.0.1:40123 -> 8000
                if "Forwarding from" not in line:
                    raise KubectlError(f"port-forward to {target}: {line.strip()}")
                yield "http://" + line.split("Forwarding from ")[1].split(" ")[0]
            finally:
                process.kill()
