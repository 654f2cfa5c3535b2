"""The node itself: what every other scenario stands on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LOCAL = Path(__file__).resolve().parents[2] / ".local"
IMAGES = LOCAL / "images.json"
BASE = json.loads(IMAGES.read_text()).get("base", "") if IMAGES.exists() else ""

pytestmark = pytest.mark.skipif(not BASE, reason="needs `localkube up` and `localkube build base`")

Manifest = dict[str, Any]
RESTRICTED: Manifest = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


class Kubectl:
    """kubectl in one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def attempt(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        argv = [str(LOCAL / "bin" / "kubectl"), "--kubeconfig", str(LOCAL / "kubeconfig"), "-n", self.namespace, *words]
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=120)

    def __call__(self, *words: str, stdin: str | None = None) -> str:
        done = self.attempt(*words, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, *manifests: Manifest) -> None:
        self("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)}))

    def get(self, kind: str, name: str) -> Manifest:
        found: Manifest = json.loads(self("get", kind, name, "-o", "json"))
        return found


@pytest.fixture(scope="module")
def kubectl() -> Iterator[Kubectl]:
    in_namespace = Kubectl("node-basics")
    in_namespace("delete", "namespace", in_namespace.namespace, "--ignore-not-found", "--wait")
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    in_namespace.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": in_namespace.namespace, "labels": label}}
    )
    wait_until(lambda: in_namespace.attempt("get", "serviceaccount", "default").returncode == 0)
    yield in_namespace
    in_namespace("delete", "namespace", in_namespace.namespace, "--wait=false")


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def pod(name: str, script: str, **extra: Any) -> Manifest:
    """A pod that runs a few lines of Python under the `restricted` Pod Security level."""
    volumes = extra.pop("volumes", [])
    token = extra.pop("token", False)
    container = {
        "name": "main",
        "image": BASE,
        "command": ["python3", "-c", script],
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "volumeMounts": [{"name": v["name"], "mountPath": f"/{v['name']}"} for v in volumes],
        **extra,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": token,
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
            "volumes": volumes,
        },
    }


def finish(kubectl: Kubectl, manifest: Manifest) -> tuple[Manifest, str]:
    """Run a pod to its end; return the state its container ended in, and its log."""
    name = manifest["metadata"]["name"]
    kubectl.apply(manifest)

    def ended() -> bool:
        return kubectl.get("pod", name)["status"].get("phase") in ("Succeeded", "Failed")

    wait_until(ended)
    state: Manifest = kubectl.get("pod", name)["status"]["containerStatuses"][0]["state"]["terminated"]
    return state, kubectl("logs", name)


def test_a_restricted_pod_runs_as_its_user_and_cannot_write_to_its_image(kubectl: Kubectl) -> None:
    script = "import os; print(os.getuid(), flush=True); open('/here', 'w')"
    state, log = finish(kubectl, pod("restricted", script))
    assert log.splitlines()[0] == "65532"
    assert "Read-only file system" in log
    assert state["exitCode"] == 1


def test_pod_security_refuses_a_root_pod(kubectl: Kubectl) -> None:
    manifest = pod("root", "pass", securityContext={"runAsUser": 0})
    refused = kubectl.attempt("apply", "-f", "-", stdin=json.dumps(manifest))
    assert refused.returncode != 0
    assert 'violates PodSecurity "restricted' in refused.stderr


def test_a_pod_over_its_memory_limit_ends_as_oomkilled(kubectl: Kubectl) -> None:
    state, _ = finish(kubectl, pod("hungry", "kept = bytearray(200 << 20); print(len(kept))"))
    assert state["reason"] == "OOMKilled"
    assert state["exitCode"] == 137


def test_the_termination_message_reaches_the_status(kubectl: Kubectl) -> None:
    script = "open('/dev/termination-log', 'w').write('the result')"
    state, _ = finish(kubectl, pod("message", script))
    assert (state["exitCode"], state["message"]) == (0, "the result")


def test_a_service_is_reached_by_its_name_from_another_pod(kubectl: Kubectl) -> None:
    serve = "import http.server as h; h.HTTPServer(('', 8080), h.SimpleHTTPRequestHandler).serve_forever()"
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    kubectl.apply(
        pod("web", serve, readinessProbe=probe),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
        },
    )
    kubectl("wait", "--for=condition=Ready", "pod/web", "--timeout=60s")
    script = (
        "import urllib.request as u\n"
        "for name in ['web', 'web.node-basics.svc.cluster.local']:\n"
        "    print(name, u.urlopen(f'http://{name}/', timeout=10).status)"
    )
    _, log = finish(kubectl, pod("caller", script))
    assert log.split() == ["web", "200", "web.node-basics.svc.cluster.local", "200"]


def test_a_pod_reaches_the_api_server_with_its_token(kubectl: Kubectl) -> None:
    script = (
        "import json, ssl, urllib.request as u\n"
        "folder = '/var/run/secrets/kubernetes.io/serviceaccount/'\n"
        "context = ssl.create_default_context(cafile=folder + 'ca.crt')\n"
        "headers = {'Authorization': 'Bearer ' + open(folder + 'token').read(), 'Content-Type': 'application/json'}\n"
        "review = {'apiVersion': 'authentication.k8s.io/v1', 'kind': 'SelfSubjectReview'}\n"
        "url = 'https://10.96.0.1/apis/authentication.k8s.io/v1/selfsubjectreviews'\n"
        "call = u.Request(url, json.dumps(review).encode(), headers)\n"
        "print(json.load(u.urlopen(call, timeout=10, context=context))['status']['userInfo']['username'])"
    )
    _, log = finish(kubectl, pod("account", script, token=True))
    assert log.strip() == "system:serviceaccount:node-basics:default"


def test_exec_reaches_a_running_pod(kubectl: Kubectl) -> None:
    kubectl.apply(pod("idle", "import time; time.sleep(600)"))
    kubectl("wait", "--for=condition=Ready", "pod/idle", "--timeout=60s")
    assert kubectl("exec", "idle", "--", "python3", "-c", "print(6 * 7)").strip() == "42"


def test_a_claim_binds_and_a_non_root_pod_writes_to_it(kubectl: Kubectl) -> None:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": spec})
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    state, log = finish(kubectl, pod("writer", "open('/data/x', 'w').write('kept')", volumes=volumes))
    assert state["exitCode"] == 0, log
    _, log = finish(kubectl, pod("reader", "print(open('/data/x').read())", volumes=volumes))
    assert log.strip() == "kept"


def test_a_job_completes(kubectl: Kubectl) -> None:
    template = pod("job", "print('done')")["spec"]
    job = {"template": {"spec": template}, "backoffLimit": 0}
    kubectl.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"}, "spec": job})
    kubectl("wait", "--for=condition=Complete", "job/once", "--timeout=60s")
