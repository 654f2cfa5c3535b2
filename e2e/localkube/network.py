"""The node's network: one bridge that carries the node's address, and our own iptables chains.

The bridge address is the node's, so the API server and the kubelet listen where only this machine
and its pods reach them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from localkube import paths, shell

KUBERNETES_CHAIN = re.compile(r"^:(KUBE-\S+|SLMOPS-\S+) ", re.MULTILINE)
TABLES = ("filter", "nat", "mangle")
SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    "net.bridge.bridge-nf-call-iptables": "1",
}
# The kubelet sets these on its own; `down` puts the machine's values back.
KUBELET_SYSCTLS = ("vm.overcommit_memory", "vm.panic_on_oom", "kernel.panic", "kernel.panic_on_oops")
_SAVED = paths.RUN / "sysctl.json"


def set_up() -> None:
    _save_sysctls()
    for name, value in SYSCTLS.items():
        write_sysctl(name, value)
    shell.run("ip", "link", "add", paths.BRIDGE, "type", "bridge")
    shell.run("ip", "address", "add", f"{paths.NODE_IP}/24", "dev", paths.BRIDGE)
    shell.run("ip", "link", "set", paths.BRIDGE, "up")
    # Services are reached through the bridge even on a machine without a default route.
    shell.run("ip", "route", "replace", paths.SERVICE_CIDR, "dev", paths.BRIDGE)
    shell.run("iptables-restore", "--noflush", stdin=rules())


def tear_down() -> None:
    for link in _links():
        shell.attempt("ip", "link", "delete", link)
    for tool in ("iptables", "ip6tables"):
        for table in TABLES:
            saved = shell.attempt(f"{tool}-save", "-t", table)
            script = removal(table, saved.stdout) if saved.returncode == 0 else ""
            if script:
                shell.run(f"{tool}-restore", "--noflush", stdin=script)
    _restore_sysctls()


def bridge_sees_iptables() -> bool:
    """Without br_netfilter replies between pods bypass NAT, and kube-proxy must masquerade all."""
    return read_sysctl("net.bridge.bridge-nf-call-iptables") == "1"


def rules() -> str:
    """Let pods out through NAT, let nobody else in to the node's address."""
    chain, bridge = paths.CHAIN, paths.BRIDGE
    return f"""\
*filter
:{chain}-IN - [0:0]
:{chain}-FWD - [0:0]
-A {chain}-IN -d {paths.NODE_IP}/32 ! -i {bridge} -m addrtype ! --src-type LOCAL -j DROP
-A {chain}-FWD -d {paths.POD_CIDR} ! -i {bridge} -m conntrack --ctstate NEW -m addrtype ! --src-type LOCAL -j DROP
-A {chain}-FWD -i {bridge} -j ACCEPT
-A {chain}-FWD -o {bridge} -j ACCEPT
-I INPUT -j {chain}-IN
-I FORWARD -j {chain}-FWD
COMMIT
*nat
:{chain}-NAT - [0:0]
-A {chain}-NAT -s {paths.POD_CIDR} ! -d {paths.POD_CIDR} -j MASQUERADE
-A POSTROUTING -j {chain}-NAT
COMMIT
"""


def removal(table: str, saved: str) -> str:
    """An atomic iptables-restore script that takes our chains and Kubernetes' out of one table."""
    chains = KUBERNETES_CHAIN.findall(saved)
    if not chains:
        return ""
    jumps = [
        line.replace("-A ", "-D ", 1)
        for line in saved.splitlines()
        if line.startswith("-A ") and line.split()[1] not in chains and any(word in chains for word in line.split()[2:])
    ]
    flush = [f":{chain} - [0:0]" for chain in chains]
    delete = [f"-X {chain}" for chain in chains]
    return "\n".join([f"*{table}", *flush, *jumps, *delete, "COMMIT", ""])


def _links() -> list[str]:
    found = shell.attempt("ip", "-json", "link", "show", "master", paths.BRIDGE)
    members = [link["ifname"] for link in json.loads(found.stdout or "[]") if link] if not found.returncode else []
    bridge = [paths.BRIDGE] if Path(f"/sys/class/net/{paths.BRIDGE}").exists() else []
    return [*members, *bridge]


def read_sysctl(name: str) -> str:
    path = _sysctl(name)
    return path.read_text().strip() if path.exists() else ""


def write_sysctl(name: str, value: str) -> None:
    path = _sysctl(name)
    if path.exists() and path.read_text().strip() != value:
        path.write_text(value)


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name.replace(".", "/")


def _save_sysctls() -> None:
    if not _SAVED.exists():
        names = [*SYSCTLS, *KUBELET_SYSCTLS]
        _SAVED.write_text(json.dumps({name: read_sysctl(name) for name in names if read_sysctl(name)}))


def _restore_sysctls() -> None:
    if _SAVED.exists():
        for name, value in json.loads(_SAVED.read_text()).items():
            write_sysctl(name, value)
        _SAVED.unlink()
