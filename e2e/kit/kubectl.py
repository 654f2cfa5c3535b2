"""kubectl, as users have it: every call is a process, every object plain JSON."""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / ".local"

Object = dict[str, Any]
T = TypeVar("T")


FORWARD_SECONDS = 30.0  # until a port-forward listens
CLIENT_LOG = re.compile(r"[EWI]\d{4} \d\d:")  # what the client library logs before kubectl says what is wrong
FORWARDING = re.compile(r"^Forwarding from (127\.0\.0\.1:\d+) ", re.MULTILINE)


class KubectlError(Exception):
    """kubectl said no, or nothing in time; the message has the command and kubectl's own words."""


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


CURRENT = os.environ.get("CLUSTER") == "current"  # the user's own kube context, not the local node


NEAR = "localhost,127.0.0.1,10.244.0.0/24,10.96.0.0/16"  # what no proxy reaches: the local node's networks, too
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


def shell() -> str:
    """What a shell needs before its kubectl asks the local node, as a line; empty with the user's own context."""
    if CURRENT:
        return ""
    words = ["export KUBECONFIG=$PWD/.local/kubeconfig PATH=$PWD/.local/bin:$PATH"]
    if any(os.environ.get(name) for name in PROXIES):  # kubectl goes by the one spelling, curl by the other
        words += [f"NO_PROXY=${{NO_PROXY:-$no_proxy}},{NEAR}", f"no_proxy=${{no_proxy:-$NO_PROXY}},{NEAR}"]
    return " ".join(words) + "\n  "


class Kubectl:
    """kubectl in one namespace of one cluster: the local node's, or with `current` that of the user's kube context."""

    def __init__(self, namespace: str = "default", *, current: bool = CURRENT) -> None:
        self.namespace, self.current = namespace, current
        own = LOCAL / "bin" / "kubectl"
        self.program = str(own) if own.exists() and not current else "kubectl"
        # Without the user's own defaults of flags: `delete` that asks back would delete nothing.
        self.env = {**os.environ, "KUBECTL_KUBERC": "false"}
        if not current:
            self.env["KUBECONFIG"] = str(LOCAL / "kubeconfig")

    def within(self, namespace: str) -> "Kubectl":
        """The same cluster, another namespace."""
        return Kubectl(namespace, current=self.current)

    def run(self, *args: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        """Standard output of `kubectl -n <namespace> <args>`. Raises KubectlError."""
        return self._call(args, stdin, timeout).stdout

    def warnings(self, *args: str, stdin: str | None = None) -> str:
        """What `kubectl -n <namespace> <args>` says on standard error although it succeeds. Raises KubectlError."""
        return self._call(args, stdin, 60.0).stderr

    def _call(self, args: tuple[str, ...], stdin: str | None, timeout: float) -> subprocess.CompletedProcess[str]:
        command = " ".join(["kubectl", "-n", self.namespace, *args])
        try:
            done = subprocess.run(
                [self.program, "-n", self.namespace, *args],
                input=stdin or "",  # never the terminal's, where nobody would see what it asks
                env=self.env,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace").strip()  # bytes, whatever `text` says
            raise KubectlError(f"{command}: no answer within {timeout:.0f} s {said}".rstrip()) from None
        except FileNotFoundError:
            raise KubectlError(
                f"{command}: there is no program {self.program}. `make up` brings one with the local node"
            ) from None
        if done.returncode:
            said = "\n".join(line for line in done.stderr.splitlines() if not CLIENT_LOG.match(line))
            raise KubectlError(f"{command}: {said.strip() or done.stderr.strip() or done.stdout.strip()}")
        return done

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
        """Delete; an absent object is fine. Raises KubectlError if it is still there after three minutes."""
        self.run(
            "delete", kind, name, "--ignore-not-found", f"--wait={str(wait).lower()}", "--timeout=180s", timeout=200
        )

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
        """`http://127.0.0.1:<free port>` leading to `target` (for example service/assistant) while the block runs.

        Raises KubectlError with kubectl's words if it ends, TimedOut if it does not listen in time.
        """
        words = [self.program, "-n", self.namespace, "port-forward", target, f":{port}"]
        # A file: kubectl writes a line for each connection, and would hang on a pipe that nobody reads.
        with (
            tempfile.NamedTemporaryFile() as output,
            subprocess.Popen(words, env=self.env, stdout=output, stderr=subprocess.STDOUT) as process,
        ):

            def address() -> str:
                ended = process.poll()  # before its words are read, or its last ones are missed
                said = Path(output.name).read_text(encoding="utf-8")
                if ended is not None:
                    raise KubectlError(f"port-forward to {target} ended with {ended}: {said.strip()}")
                found = FORWARDING.search(said)
                return found[1] if found else ""

            try:
                yield f"http://{wait_for(f'port-forward to {target}', address, FORWARD_SECONDS, every=0.05)}"
            finally:
                process.kill()
