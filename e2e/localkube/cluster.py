"""Bringing the whole cluster up and down, in the order a reader would do it by hand."""

from __future__ import annotations

import json
import shutil

from localkube import bare, build, control, daemons, leftovers, network, node, packages, paths, seed, shell, tools
from localkube.control import Endpoint
from localkube.daemons import Daemon
from localkube.files import write_json
from localkube.paths import CLUSTER
from localkube.say import Failure, step

ENDPOINT = Endpoint(paths.NODE_IP, paths.API_PORT)
DAEMONS = (
    "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler",
    "containerd", "kubelet", "kube-proxy", "coredns",
)  # fmt: skip


def up() -> None:
    tools.require_root()
    with shell.locked(paths.LOCK):
        trouble = problems()
        if not trouble:
            renewed = seed.renew_volumes()
            step(f"already up{f', {renewed} volumes renewed' if renewed else ''}")
            _say_how()
            return
        packages.ensure(packages.NODE)
        tools.ensure()
        _clear(trouble)
        _start()
    _say_how()


def down(*, purge: bool = False) -> None:
    tools.require_root()
    with shell.locked(paths.LOCK):
        if paths.CONTAINERD_SOCKET.exists():
            step("stopping pods")
            try:
                node.stop_pods()
            except Failure as failure:
                step(f"{failure.what}; going on without containerd")
        step("stopping the cluster")
        leftovers.sweep()
        bare.sweep(paths.LOCAL)
        build.stop()
        packages.clean()
        for path in [paths.KUBECONFIG, paths.IMAGES_JSON, paths.LOCAL / "run"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(paths.VOLUMES, ignore_errors=True)
        if purge:
            step(f"removing the caches below {paths.CACHE}")
            for folder in paths.LOCAL.glob("apiserver*"):
                bare.down(folder)
            build.purge()
            shutil.rmtree(paths.LOCAL, ignore_errors=True)
        paths.LOCK.unlink()
    step("down")


def problems() -> list[str]:
    """Why this clone's cluster is not usable as it is; empty when it is healthy."""
    if not paths.RECORD.exists():
        return ["not started"]
    other = leftovers.other_owner()
    if other is not None:
        return [f"the machine's cluster belongs to {other}"]
    running = daemons.recorded(CLUSTER.pids)
    dead = [name for name in DAEMONS if name not in running or not running[name].alive()]
    if dead:
        return [f"{name} is not running" for name in dead]
    if not control.answers(f"{ENDPOINT.url}/readyz", control.client_context(CLUSTER)):
        return ["the API server is not ready"]
    return [] if node.is_ready() else [f"the node {paths.NODE} is not ready"]


def _clear(trouble: list[str]) -> None:
    if other := leftovers.other_owner():
        step(f"ending the cluster of {other}: a machine has room for one")
    elif trouble != ["not started"]:
        step(f"clearing what is left ({'; '.join(trouble)})")
    leftovers.sweep()
    strangers = daemons.kubernetes_beside()
    if strangers:
        raise Failure(
            f"another Kubernetes node runs on this machine (pid {strangers[0]})",
            hint="use that cluster through your kube context (CLUSTER=current), or stop it first",
        )
    network.check_free()


def _start() -> None:
    paths.RUN.mkdir(parents=True, mode=0o711, exist_ok=True)
    CLUSTER.pids.mkdir(exist_ok=True)
    link = paths.LOCAL / "run"
    link.unlink(missing_ok=True)
    link.symlink_to(CLUSTER.pids)
    write_json(paths.RECORD, {"repo": str(paths.REPO)})
    step("starting the control plane")
    network.set_up()
    authority = control.create_pki(CLUSTER, ENDPOINT)
    etcd, etcd_url = control.start_etcd(CLUSTER)
    api = control.start_apiserver(CLUSTER, authority, ENDPOINT, etcd_url, node.apiserver_options(authority))
    # The runtime needs nothing of the API server, so both start at once.
    runtime = node.start_runtime()
    control.wait_ready(CLUSTER, ENDPOINT, [etcd, api])
    control.start_controllers(CLUSTER, authority, ENDPOINT)
    seed.apply()
    step("starting the node")
    node.start_agents(authority, ENDPOINT, runtime)
    node.wait_ready()
    build.record_present()
    step(f"node {paths.NODE} is Ready")


def status() -> int:
    trouble = problems()
    for line in trouble:
        print(line)
    if trouble:
        return 1
    running: dict[str, Daemon] = daemons.recorded(CLUSTER.pids)
    print("\n".join(f"{name:24} pid {running[name].pid}" for name in DAEMONS))
    print(seed.kubectl("get", "nodes", "-o", "wide").rstrip())
    images = json.loads(paths.IMAGES_JSON.read_text()) if paths.IMAGES_JSON.exists() else {}
    print("\n".join(f"{name:24} {ref}" for name, ref in images.items()))
    return 0


def _say_how() -> None:
    step(f"kubeconfig: {paths.KUBECONFIG}")
