"""The control plane: etcd, API server, and for a full cluster controller manager and scheduler."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from localkube import config, daemons, paths, shell, tools
from localkube.daemons import Daemon
from localkube.paths import Layout
from localkube.pki import Authority


@dataclass(frozen=True)
class Endpoint:
    """Where an API server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def create_pki(layout: Layout, endpoint: Endpoint) -> Authority:
    authority = Authority.create(layout.pki)
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    addresses = dict.fromkeys([endpoint.host, "127.0.0.1", paths.API_SERVICE_IP])
    authority.server(
        "apiserver",
        "kube-apiserver",
        [*(f"DNS:{n}" for n in [*names, "localhost"]), *(f"IP:{a}" for a in addresses)],
    )
    authority.client("admin", "slmops-local-admin", "system:masters")
    write_kubeconfig(authority, "admin", endpoint, layout.kubeconfig)
    return authority


def write_kubeconfig(authority: Authority, user: str, endpoint: Endpoint, target: Path) -> None:
    text = config.kubeconfig(
        endpoint.url,
        authority.cert("ca").read_bytes(),
        authority.cert(user).read_bytes(),
        authority.key(user).read_bytes(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
        out.write(text)
    partial.replace(target)


def start_etcd(layout: Layout) -> tuple[Daemon, str]:
    """Reached through a socket in a folder of mode 0700: no port, no password, no stranger."""
    for folder in [layout.etcd_data, layout.sockets]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
    client = f"unix://{layout.sockets}/client.sock"
    unused = "http://127.0.0.1:1"
    options: dict[str, str | Path | int] = {
        "name": "local",
        "data-dir": layout.etcd_data / "data",
        "listen-client-urls": client,
        "advertise-client-urls": unused,
        "listen-peer-urls": f"unix://{layout.sockets}/peer.sock",
        "initial-advertise-peer-urls": unused,
        "initial-cluster": f"local={unused}",
        "log-level": "warn",
    }
    argv = [str(tools.path("etcd")), *config.flags(options), "--unsafe-no-fsync"]
    return daemons.start("etcd", argv, pids=layout.pids, log=layout.log), client


def start_apiserver(
    layout: Layout, authority: Authority, endpoint: Endpoint, etcd: str, extra: dict[str, str | Path | int]
) -> Daemon:
    options: dict[str, str | Path | int] = {
        "etcd-servers": etcd,
        "bind-address": endpoint.host,
        "advertise-address": endpoint.host,
        "secure-port": endpoint.port,
        "tls-cert-file": authority.cert("apiserver"),
        "tls-private-key-file": authority.key("apiserver"),
        "client-ca-file": authority.cert("ca"),
        "service-cluster-ip-range": paths.SERVICE_CIDR,
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-signing-key-file": authority.key("sa"),
        "service-account-key-file": layout.pki / "sa.pub",
        "allow-privileged": "true",
        "profiling": "false",
        **extra,
    }
    argv = [str(tools.path("kube-apiserver")), *config.flags(options)]
    return daemons.start("kube-apiserver", argv, pids=layout.pids, log=layout.log)


def wait_ready(layout: Layout, endpoint: Endpoint, watched: list[Daemon]) -> None:
    context = client_context(layout)

    def ready() -> bool:
        for daemon in watched:
            daemons.check(daemon, layout.log)
        return answers(f"{endpoint.url}/readyz", context)

    shell.wait_for("kube-apiserver", ready, seconds=90, log=layout.log / "kube-apiserver.log")


def client_context(layout: Layout) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(layout.pki / "ca.crt"))
    context.load_cert_chain(layout.pki / "admin.crt", layout.pki / "admin.key")
    return context


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def start_controllers(layout: Layout, authority: Authority, endpoint: Endpoint) -> list[Daemon]:
    started = []
    for name in ["kube-controller-manager", "kube-scheduler"]:
        authority.client(name, f"system:{name}")
        write_kubeconfig(authority, name, endpoint, layout.config / f"{name}.kubeconfig")
    common: dict[str, str | Path | int] = {"bind-address": "127.0.0.1", "leader-elect": "false", "profiling": "false"}
    manager: dict[str, str | Path | int] = {
        **common,
        "kubeconfig": layout.config / "kube-controller-manager.kubeconfig",
        "use-service-account-credentials": "true",
        "service-account-private-key-file": authority.key("sa"),
        "root-ca-file": authority.cert("ca"),
        "cluster-signing-cert-file": authority.cert("ca"),
        "cluster-signing-key-file": authority.key("ca"),
        "cluster-cidr": paths.POD_CIDR,
        "service-cluster-ip-range": paths.SERVICE_CIDR,
        "allocate-node-cidrs": "true",
    }
    scheduler = {**common, "kubeconfig": layout.config / "kube-scheduler.kubeconfig"}
    for name, options in [("kube-controller-manager", manager), ("kube-scheduler", scheduler)]:
        argv = [str(tools.path(name)), *config.flags(options)]
        started.append(daemons.start(name, argv, pids=layout.pids, log=layout.log))
    return started
