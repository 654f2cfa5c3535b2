"""The node: container runtime, kubelet, kube-proxy and DNS."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from localkube import (
    build,
    config,
    control,
    daemons,
    images,
    leftovers,
    mounts,
    network,
    paths,
    seed,
    shell,
    store,
    tools,
)
from localkube.control import Endpoint
from localkube.daemons import Daemon
from localkube.paths import CLUSTER
from localkube.pki import Authority
from localkube.say import Failure, step


def apiserver_options(authority: Authority) -> dict[str, str | Path | int]:
    """What an API server needs beyond the bare one when it has a node."""
    authority.client("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters")
    return {
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "kubelet-certificate-authority": authority.cert("ca"),
        "kubelet-client-certificate": authority.cert("apiserver-kubelet"),
        "kubelet-client-key": authority.key("apiserver-kubelet"),
        "kubelet-preferred-address-types": "InternalIP",
    }


def start_runtime() -> Daemon:
    """containerd on its kept image store, holding the pause image and no container of an earlier run."""
    try:
        daemon = _start_containerd()
    except Failure:
        step("containerd does not open its image store; starting with an empty one")
        daemons.stop(d for name, d in daemons.recorded(CLUSTER.pids).items() if name == "containerd")
        mounts.remove(paths.CONTAINERD_ROOT)
        daemon = _start_containerd()
    if store.remove_containers():
        # Its CRI part has loaded them already and would go on listing them.
        daemons.stop([daemon])
        daemon = _start_containerd()
    build.ensure("pause")
    return daemon


def _start_containerd() -> Daemon:
    for folder in [paths.CONTAINERD_ROOT, paths.CONTAINERD_STATE, paths.CNI_STATE, CLUSTER.config / "cni"]:
        folder.mkdir(parents=True, exist_ok=True)
    (CLUSTER.config / "cni" / "10-slmops.conflist").write_text(config.cni())
    file = CLUSTER.config / "containerd.toml"
    file.write_text(config.containerd(images.reference("pause"), CLUSTER.config / "cni"))
    argv = [shutil.which("containerd") or "containerd", "--config", str(file)]
    daemon = daemons.start("containerd", argv, pids=CLUSTER.pids, log=CLUSTER.log)

    def ready() -> bool:
        daemons.check(daemon, CLUSTER.log)
        return store.answers()

    shell.wait_for("containerd", ready, seconds=30, log=CLUSTER.log / "containerd.log")
    return daemon


def start_agents(authority: Authority, endpoint: Endpoint, runtime: Daemon) -> None:
    daemons.check(runtime, CLUSTER.log)
    leftovers.create_cgroups()
    authority.server("kubelet-server", f"system:node:{paths.NODE}", [f"DNS:{paths.NODE}", f"IP:{paths.NODE_IP}"])
    authority.client("kubelet", f"system:node:{paths.NODE}", "system:nodes")
    authority.client("kube-proxy", "system:kube-proxy")
    authority.client("coredns", "system:coredns")
    for name in ["kubelet", "kube-proxy", "coredns"]:
        control.write_kubeconfig(authority, name, endpoint, _kubeconfig(name))
    masquerade_all = not network.bridge_sees_iptables()
    (CLUSTER.config / "kubelet.yaml").write_text(config.kubelet(CLUSTER.pki))
    proxy = config.kube_proxy(_kubeconfig("kube-proxy"), masquerade_all=masquerade_all)
    (CLUSTER.config / "kube-proxy.yaml").write_text(proxy)
    (CLUSTER.config / "Corefile").write_text(config.corefile(_kubeconfig("coredns"), _resolv_conf()))
    kubelet_flags: dict[str, str | Path | int] = {
        "config": CLUSTER.config / "kubelet.yaml",
        "kubeconfig": _kubeconfig("kubelet"),
        "root-dir": paths.KUBELET_ROOT,
        "cert-dir": paths.KUBELET_ROOT / "pki",
        "hostname-override": paths.NODE,
        "node-ip": paths.NODE_IP,
    }
    for name, arguments in {
        "kubelet": config.flags(kubelet_flags),
        "kube-proxy": [f"--config={CLUSTER.config / 'kube-proxy.yaml'}"],
        "coredns": ["-conf", str(CLUSTER.config / "Corefile")],
    }.items():
        daemons.start(name, [str(tools.path(name)), *arguments], pids=CLUSTER.pids, log=CLUSTER.log)


def wait_ready() -> None:
    def ready() -> bool:
        running = daemons.recorded(CLUSTER.pids)
        for name in ["kubelet", "kube-proxy", "coredns", "kube-controller-manager", "kube-scheduler"]:
            daemons.check(running[name], CLUSTER.log)
        return is_ready()

    shell.wait_for(f"node {paths.NODE}", ready, seconds=90, log=CLUSTER.log / "kubelet.log")

    def serviceable() -> bool:
        return _has_default_account() and control.answers("http://127.0.0.1:10256/healthz")

    shell.wait_for("kube-proxy", serviceable, seconds=60, log=CLUSTER.log / "kube-proxy.log")


def is_ready() -> bool:
    words = ["get", "node", paths.NODE, "--ignore-not-found", "-o", "json"]
    got = shell.attempt(tools.path("kubectl"), "--kubeconfig", paths.KUBECONFIG, *words, timeout=10)
    found = json.loads(got.stdout or "{}") if got.returncode == 0 else {}
    conditions = found.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def stop_pods() -> None:
    """Stop the kubelet, then take every container out of the store while containerd still runs."""
    running = daemons.recorded(CLUSTER.pids)
    daemons.stop(d for name, d in running.items() if name == "kubelet")
    leftovers.kill_pods()
    if store.answers():
        count = store.remove_containers()
        step(f"removed {count} containers")


def _resolv_conf() -> str:
    file = Path("/etc/resolv.conf")
    return file.read_text(errors="replace") if file.exists() else ""


def _kubeconfig(name: str) -> Path:
    return CLUSTER.config / f"{name}.kubeconfig"


def _has_default_account() -> bool:
    return bool(seed.kubectl("get", "serviceaccount", "default", "--ignore-not-found", "-o", "name"))
