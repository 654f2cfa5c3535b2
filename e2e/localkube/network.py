"""The node's network: one bridge that carries the node's address, and our own iptables chains.

The bridge address is the node's, so the API server and the kubelet listen where only this machine
and its pods reach them.

kube-proxy and kubelet name their chains KUBE-* in every cluster. Ours can be told by the chain
SLMOPS-LOCAL-NAT beside them: it is the first that comes and goes with the last, and where KUBE-*
chains stand without it, no node is started.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localkube import daemons, paths, shell
from localkube.files import write_json
from localkube.say import Failure, step

CHAIN = re.compile(r"^:(\S+) ", re.MULTILINE)
OWNED = f"{paths.CHAIN}-"
MARK = f"{OWNED}NAT"
# In the order in which they are cleared: the one with the mark last.
TABLES = (
    *(("ip6tables", table) for table in ("filter", "nat", "mangle")),
    *(("iptables", table) for table in ("mangle", "filter", "nat")),
)
MARKED = ("iptables", "nat")
FORWARD = "net.ipv4.ip_forward"
SYSCTLS = {
    FORWARD: "1",
    "net.bridge.bridge-nf-call-iptables": "1",
}
# The kubelet sets these on its own; `down` puts the machine's values back.
KUBELET_SYSCTLS = ("vm.overcommit_memory", "vm.panic_on_oom", "kernel.panic", "kernel.panic_on_oops")
_SAVED = paths.RUN / "sysctl.json"
_PASSING = paths.RUN / "passing.json"


def check_free() -> None:
    """Fail where a node would change what other software set up on this machine."""
    chains = strangers(_saved_tables())
    if chains:
        raise Failure(
            f"iptables chains of another Kubernetes are on this machine ({', '.join(chains[:4])})",
            hint="use that cluster (CLUSTER=current). If it is gone: `kube-proxy --cleanup`, or delete these chains",
        )
    ruleset = shell.attempt("nft", "-j", "list", "ruleset")
    closed = firewalls(json.loads(ruleset.stdout or "{}") if ruleset.returncode == 0 else {})
    if closed:
        # Its other rules may let pods through all the same: who has a firewall is told, and not kept from trying.
        step(f"the machine's firewall may drop what pods send and get (nftables: {', '.join(closed)}). Should it:")
        step(f"  nft insert rule {closed[0]} iifname {paths.BRIDGE} accept; in a forward chain, the same with oifname")
    listed = shell.attempt("ip", "-json", "route", "show", "table", "all")
    taken = overlapping(json.loads(listed.stdout or "[]") if listed.returncode == 0 else [])
    if taken:
        raise Failure(
            f"routes of others lie in the node's networks {paths.POD_CIDR}, {paths.SERVICE_CIDR}: {', '.join(taken)}",
            hint="remove them (a VPN, another cluster), or use a cluster you have: CLUSTER=current",
        )


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
    if shutil.which("iptables-save") is None and (_bridge().exists() or paths.RUN.exists()):
        raise Failure("iptables is gone, and the node's rules are still there", hint="apt-get install iptables")
    for link in _links():
        shell.attempt("ip", "link", "delete", link)
    tables = _saved_tables()
    # A cluster that came later shares the KUBE-* chains with ours by now and renews them itself.
    ours = MARK in CHAIN.findall(tables.get(MARKED, "")) and not daemons.kubernetes_beside()
    for (tool, table), saved in tables.items():
        script = removal(table, saved, kubernetes=ours)
        if script:
            shell.run(f"{tool}-restore", "--noflush", stdin=script)
    _restore_sysctls(passing(_saved_tables()))


def bridge_sees_iptables() -> bool:
    """Without br_netfilter replies between pods bypass NAT, and kube-proxy must masquerade all."""
    return read_sysctl("net.bridge.bridge-nf-call-iptables") == "1"


def rules() -> str:
    """Let pods out through NAT and in to the node, whatever iptables says besides; let nobody else in."""
    chain, bridge = paths.CHAIN, paths.BRIDGE
    return f"""\
*nat
:{chain}-NAT - [0:0]
-A {chain}-NAT -s {paths.POD_CIDR} ! -d {paths.POD_CIDR} -j MASQUERADE
-A POSTROUTING -j {chain}-NAT
COMMIT
*filter
:{chain}-IN - [0:0]
:{chain}-FWD - [0:0]
-A {chain}-IN -i {bridge} -j ACCEPT
-A {chain}-IN -d {paths.NODE_IP}/32 ! -i {bridge} -m addrtype ! --src-type LOCAL -j DROP
-A {chain}-FWD -d {paths.POD_CIDR} ! -i {bridge} -m conntrack --ctstate NEW -m addrtype ! --src-type LOCAL -j DROP
-A {chain}-FWD -i {bridge} -j ACCEPT
-A {chain}-FWD -o {bridge} -j ACCEPT
-I INPUT -j {chain}-IN
-I FORWARD -j {chain}-FWD
COMMIT
"""


def removal(table: str, saved: str, *, kubernetes: bool) -> str:
    """An atomic iptables-restore script that takes our chains, and if wanted Kubernetes', out of one table."""
    gone = (OWNED, "KUBE-") if kubernetes else (OWNED,)
    chains = [chain for chain in CHAIN.findall(saved) if chain.startswith(gone)]
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


def strangers(tables: Mapping[tuple[str, str], str]) -> list[str]:
    """`table chain` of Kubernetes chains that are not ours, from the output of iptables-save by tool and table."""
    if MARK in CHAIN.findall(tables.get(MARKED, "")):
        return []
    return [
        f"{table} {chain}"
        for (tool, table), saved in tables.items()
        if tool == "iptables"
        for chain in CHAIN.findall(saved)
        if chain.startswith("KUBE-")
    ]


def passing(tables: Mapping[tuple[str, str], str]) -> list[str]:
    """Rules for packets that this machine passes on, from the output of iptables-save by tool and table."""
    return [
        line
        for table, start in (("nat", "-A "), ("filter", "-A FORWARD "))
        for line in tables.get(("iptables", table), "").splitlines()
        if line.startswith(start)
    ]


def restorable(saved: Mapping[str, str], before: Sequence[str], now: Sequence[str]) -> dict[str, str]:
    """The sysctls to put back; `before` and `now`: the rules of others that pass packets on.

    With more of them, somebody (Docker, libvirt) found forwarding on and relies on it: then it stays.
    """
    needed = not set(now) <= set(before)
    return {name: value for name, value in saved.items() if not (needed and (name, value) == (FORWARD, "0"))}


def overlapping(routes: list[dict[str, Any]]) -> list[str]:
    """Destinations of `ip -json route` inside the node's networks that are not its own.

    Wider ones, such as a VPN's 10.0.0.0/8, stay usable beside the node's narrower routes.
    """
    ours = [ipaddress.IPv4Network(cidr) for cidr in (paths.POD_CIDR, paths.SERVICE_CIDR)]
    found = []
    for route in routes:
        try:
            destination = ipaddress.ip_network(route.get("dst", ""), strict=False)
        except ValueError:
            continue  # "default", or a kind of route that names no network
        inside = isinstance(destination, ipaddress.IPv4Network) and any(destination.subnet_of(net) for net in ours)
        if inside and route.get("dev") != paths.BRIDGE:
            found.append(f"{route['dst']} dev {route.get('dev', '?')}")
    return found


def firewalls(ruleset: Mapping[str, Any]) -> list[str]:
    """`family table chain` of chains that drop what no rule accepts and have none for the node's bridge.

    `ruleset`: from `nft -j list ruleset`. iptables' own chains are left out: the node's rules come first in them.
    """
    entries = ruleset.get("nftables", [])
    named = [entry["rule"] for entry in entries if "rule" in entry and f'"{paths.BRIDGE}"' in json.dumps(entry)]
    opened = {(rule["family"], rule["table"], rule["chain"]) for rule in named}
    chains = [entry["chain"] for entry in entries if "chain" in entry]
    keys = [
        (chain["family"], chain["table"], chain["name"])
        for chain in chains
        if chain.get("hook") in ("input", "forward") and chain.get("policy") == "drop"
    ]
    iptables = {("ip", "filter", "INPUT"), ("ip", "filter", "FORWARD")}
    return [" ".join(key) for key in keys if key[0] in ("ip", "inet") and key not in iptables | opened]


def _saved_tables() -> dict[tuple[str, str], str]:
    """What iptables-save tells, by tool and table, in the order of clearing; without tables that cannot be read."""
    saved = {}
    for tool, table in TABLES:
        got = shell.attempt(f"{tool}-save", "-t", table)
        if got.returncode == 0:
            saved[tool, table] = got.stdout
    return saved


def _links() -> list[str]:
    found = shell.attempt("ip", "-json", "link", "show", "master", paths.BRIDGE)
    members = [link["ifname"] for link in json.loads(found.stdout or "[]") if link] if not found.returncode else []
    return [*members, *([paths.BRIDGE] if _bridge().exists() else [])]


def _bridge() -> Path:
    return Path(f"/sys/class/net/{paths.BRIDGE}")


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
    if _read(_SAVED) is None:
        write_json(_PASSING, passing(_saved_tables()))
        names = [*SYSCTLS, *KUBELET_SYSCTLS]
        write_json(_SAVED, {name: read_sysctl(name) for name in names if read_sysctl(name)})


def _restore_sysctls(now: list[str]) -> None:
    saved = _read(_SAVED)
    if saved is not None:
        back = restorable(saved, _read(_PASSING) or [], now)
        if back != saved:
            step(f"{FORWARD} stays as it is: others have set up forwarding since `up`")
        for name, value in back.items():
            write_sysctl(name, value)
    _SAVED.unlink(missing_ok=True)


def _read(file: Path) -> Any:
    """None also where there is half a file, from a full disk: nothing was set before it was whole."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
