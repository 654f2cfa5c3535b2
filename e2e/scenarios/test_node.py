"""The node itself: what every other scenario stands on. Nothing is skipped: without a node it fails."""

from collections.abc import Iterator
from typing import Any

import pytest

from kit import chart, pods
from kit.kubectl import Kubectl, KubectlError, Object, wait_for

NAMESPACE = "node-basics"
LIMITS: Object = {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}}
GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def kubectl(installed: Kubectl) -> Iterator[Kubectl]:
    """kubectl in an empty namespace that admits restricted pods only."""
    kube = installed.within(NAMESPACE)
    chart.fresh_namespace(kube)
    wait_for("the namespace has its account", lambda: kube.get("serviceaccount", "default"), 30)
    yield kube
    kube.delete("namespace", NAMESPACE, wait=False)


def pod(name: str, script: str, *, mounts: dict[str, Object] | None = None, token: bool = False, **more: Any) -> Object:
    """A pod that runs a few lines of Python; `more`: fields of its container."""
    image = chart.running_images(Kubectl(NAMESPACE))["operator"]  # any that has Python
    made = pods.spec(image, ["python3", "-c", script], mounts=mounts, token=token, **{"resources": LIMITS, **more})
    return pods.pod(name, made)


def finish(kubectl: Kubectl, manifest: Object) -> tuple[Object, str]:
    """Run a pod to its end; return the state its container ended in, and its log."""
    name = manifest["metadata"]["name"]
    kubectl.apply(manifest)
    wait_for(f"pod/{name} ends", lambda: pods.phase(kubectl, name) in ("Succeeded", "Failed"), 60, every=0.2)
    state: Object = (kubectl.get("pod", name) or {})["status"]["containerStatuses"][0]["state"]["terminated"]
    return state, kubectl.run("logs", name)


def test_a_restricted_pod_runs_as_its_user_and_cannot_write_to_its_image(kubectl: Kubectl) -> None:
    script = "import os; print(os.getuid(), flush=True); open('/here', 'w')"
    state, log = finish(kubectl, pod("restricted", script))
    assert log.splitlines()[0] == "65532"
    assert "Read-only file system" in log
    assert state["exitCode"] == 1


def test_pod_security_refuses_a_root_pod(kubectl: Kubectl) -> None:
    manifest = pod("root", "pass", securityContext={"runAsUser": 0})
    with pytest.raises(KubectlError, match='violates PodSecurity "restricted'):
        kubectl.apply(manifest)


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
    kubectl.run("wait", "--for=condition=Ready", "pod/web", "--timeout=60s")
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
    kubectl.run("wait", "--for=condition=Ready", "pod/idle", "--timeout=60s")
    assert kubectl.run("exec", "idle", "--", "python3", "-c", "print(6 * 7)").strip() == "42"


def test_a_claim_binds_and_a_non_root_pod_writes_to_it(kubectl: Kubectl) -> None:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": spec})
    mounts: dict[str, Object] = {"/data": {"persistentVolumeClaim": {"claimName": "data"}}}
    state, log = finish(kubectl, pod("writer", "open('/data/x', 'w').write('kept')", mounts=mounts))
    assert state["exitCode"] == 0, log
    _, log = finish(kubectl, pod("reader", "print(open('/data/x').read())", mounts=mounts))
    assert log.strip() == "kept"


def test_a_job_completes(kubectl: Kubectl) -> None:
    template = pod("job", "print('done')")["spec"]
    job = {"template": {"spec": template}, "backoffLimit": 0}
    kubectl.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"}, "spec": job})
    kubectl.run("wait", "--for=condition=Complete", "job/once", "--timeout=60s")


def test_an_extended_resource_is_counted_as_a_gpu_is(kubectl: Kubectl, gpu_node: str) -> None:
    """One GPU, two pods that want it: one runs, the other one waits until it is free."""
    limits: dict[str, Any] = {"resources": {"limits": {"memory": "64Mi", GPU: "1"}}}

    def running() -> list[str]:
        return [n for n in ("gpu-1", "gpu-2") if pods.phase(kubectl, n) == "Running"]

    try:
        kubectl.apply(*(pod(name, "import time; time.sleep(600)", **limits) for name in ("gpu-1", "gpu-2")))
        wait_for("both wait", lambda: unschedulable(kubectl, "gpu-1") and unschedulable(kubectl, "gpu-2"), 30)
        with_gpu(kubectl, gpu_node, "1")
        (first,) = wait_for("one runs", running, 60)
        (second,) = {"gpu-1", "gpu-2"} - {first}
        assert f"Insufficient {GPU}" in unschedulable(kubectl, second)
        kubectl.delete("pod", first)
        wait_for("then the other one", lambda: running() == [second], 60)
    finally:
        for name in ("gpu-1", "gpu-2"):
            kubectl.delete("pod", name)
        with_gpu(kubectl, gpu_node, None)


def unschedulable(kubectl: Kubectl, name: str) -> str:
    """The scheduler's message; empty while it has none."""
    conditions = ((kubectl.get("pod", name) or {}).get("status") or {}).get("conditions") or []
    return next((c["message"] for c in conditions if c.get("reason") == "Unschedulable"), "")


def with_gpu(kubectl: Kubectl, node: str, count: str | None) -> None:
    """As a device plugin would: the node's capacity; None takes it away."""
    patch = {"status": {"capacity": {GPU: count}, "allocatable": {GPU: count}}}
    kubectl.patch("node", node, patch, subresource="status")
