"""The pure parts of the local cluster: hashes of images, rendered configuration, clean-up scripts."""

from __future__ import annotations

import base64
import json
import re
import tomllib
from pathlib import Path

import pytest

from kit.kubectl import NEAR
from localkube import cli, config, daemons, images, network, paths, rootfs, seed, tools
from localkube.images import Image
from localkube.say import Failure


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    for name, text in {
        "images/base/Dockerfile": "FROM scratch",
        "images/x/Dockerfile": "FROM base",
        "lib/a.py": "a = 1",
        "lib/__pycache__/a.pyc": "noise",
        "lib/tests/test_a.py": "noise",
        "other.txt": "noise",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


X = Image("x", ("images/x", "lib", "not/there/yet"))


def test_hash_is_stable_and_twelve_hex_digits(repo: Path) -> None:
    first = images.content_hash(X, repo)
    assert first == images.content_hash(X, repo)
    assert len(first) == 12
    assert int(first, 16) >= 0


@pytest.mark.parametrize("changed", ["lib/a.py", "images/x/Dockerfile", "images/base/Dockerfile", "lib/new.py"])
def test_hash_follows_inputs_and_base(repo: Path, changed: str) -> None:
    before = images.content_hash(X, repo)
    (repo / changed).write_text("changed")
    assert images.content_hash(X, repo) != before


@pytest.mark.parametrize("changed", ["other.txt", "lib/__pycache__/a.pyc", "lib/tests/test_a.py"])
def test_hash_ignores_what_is_not_an_input(repo: Path, changed: str) -> None:
    before = images.content_hash(X, repo)
    (repo / changed).write_text("changed")
    assert images.content_hash(X, repo) == before


def test_hash_does_not_depend_on_where_the_clone_lies(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("moved") / "clone"
    repo_hash = images.content_hash(X, repo)
    repo.rename(moved)
    assert images.content_hash(X, moved) == repo_hash


def test_hash_sees_a_file_become_runnable(repo: Path) -> None:
    before = images.content_hash(X, repo)
    (repo / "lib/a.py").chmod(0o755)
    assert images.content_hash(X, repo) != before


def test_only_other_dev_tags_of_the_same_image_are_old() -> None:
    current = "docker.io/slmops/server:dev-0123456789ab"
    assert images.is_old("docker.io/slmops/server:dev-ba9876543210", current)
    assert not images.is_old(current, current)
    assert not images.is_old("docker.io/slmops/server:v1", current)
    assert not images.is_old("docker.io/slmops/server-x:dev-ba9876543210", current)
    assert not images.is_old("sha256:0123", current)


def test_ignore_file_keeps_exactly_the_inputs() -> None:
    lines = images.ignore_file(X).splitlines()
    assert lines[:3] == ["*", "!images/x", "!lib"]
    assert "**/__pycache__" in lines


def test_an_unknown_image_is_named_with_the_known_ones() -> None:
    with pytest.raises(Failure) as caught:
        images.named("sever")
    assert "server" in caught.value.report()


def test_containerd_config_parses_and_survives_without_sys_resource() -> None:
    parsed = tomllib.loads(config.containerd("docker.io/slmops/pause:x", Path("/cni")))
    cri = parsed["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["restrict_oom_score_adj"] is True
    assert cri["sandbox_image"] == "docker.io/slmops/pause:x"
    assert cri["cni"]["conf_dir"] == "/cni"
    assert parsed["grpc"]["address"] == str(paths.CONTAINERD_SOCKET)


def test_no_image_is_collected_and_no_pod_evicted_by_a_share_of_the_disk() -> None:
    kubelet = json.loads(config.kubelet(Path("/pki")))
    assert kubelet["imageGCHighThresholdPercent"] == 100
    assert kubelet["evictionHard"]["nodefs.available"] == "1%"
    assert kubelet["authentication"]["anonymous"]["enabled"] is False


def test_kubeconfig_holds_its_credentials() -> None:
    parsed = json.loads(config.kubeconfig("https://10.0.0.1:6443", b"ca", b"cert", b"key"))
    assert parsed["clusters"][0]["cluster"]["server"] == "https://10.0.0.1:6443"
    assert base64.b64decode(parsed["users"][0]["user"]["client-key-data"]) == b"key"


def test_cni_gives_pods_the_bridge_as_gateway() -> None:
    (bridge,) = json.loads(config.cni())["plugins"]
    assert bridge["bridge"] == paths.BRIDGE
    assert bridge["ipam"]["ranges"] == [[{"subnet": paths.POD_CIDR, "gateway": paths.NODE_IP}]]


@pytest.mark.parametrize(
    ("resolv_conf", "asks"),
    [
        ("nameserver 192.0.2.53\n", True),
        ("search lan\n nameserver ::1\n", True),
        ("# nameserver 192.0.2.53\nsearch lan\n", False),
        ("", False),
    ],
)
def test_names_of_the_world_are_forwarded_where_somebody_can_be_asked(resolv_conf: str, asks: bool) -> None:
    text = config.corefile(Path("/kubeconfig"), resolv_conf)
    assert ("forward . /etc/resolv.conf" in text) is asks
    assert "kubernetes cluster.local" in text


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, NEAR),
        ({"NO_PROXY": "a.test,", "no_proxy": "b.test,a.test"}, f"a.test,b.test,{NEAR}"),
        ({"no_proxy": "b.test"}, f"b.test,{NEAR}"),
        ({"NO_PROXY": NEAR, "no_proxy": NEAR}, NEAR),
    ],
)
def test_the_node_is_reached_without_a_proxy(said: dict[str, str], expected: str) -> None:
    assert cli.no_proxy(said) == expected


def test_pods_reach_the_node_behind_a_firewall() -> None:
    lines = network.rules().splitlines()
    accept = lines.index(f"-A SLMOPS-LOCAL-IN -i {paths.BRIDGE} -j ACCEPT")
    assert accept < lines.index("-I INPUT -j SLMOPS-LOCAL-IN")


SAVED = """\
*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-X - [0:0]
:SLMOPS-LOCAL-NAT - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j DOCKER
-A POSTROUTING -j SLMOPS-LOCAL-NAT
-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-X
COMMIT
"""


def test_removal_takes_out_our_chains_and_nothing_else() -> None:
    script = network.removal("nat", SAVED, kubernetes=True).splitlines()
    assert script[0] == "*nat"
    assert script[-1] == "COMMIT"
    assert '-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES' in script
    assert "-D POSTROUTING -j SLMOPS-LOCAL-NAT" in script
    assert [line for line in script if line.startswith("-X")] == [
        "-X KUBE-SERVICES",
        "-X KUBE-SVC-X",
        "-X SLMOPS-LOCAL-NAT",
    ]
    assert not any("DOCKER" in line for line in script)


def test_removal_has_nothing_to_do_on_a_clean_machine() -> None:
    assert network.removal("filter", "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n", kubernetes=True) == ""


def test_removal_leaves_the_chains_of_another_kubernetes() -> None:
    script = network.removal("nat", SAVED, kubernetes=False)
    assert "SLMOPS-LOCAL-NAT" in script
    assert "KUBE-" not in script


def test_kubernetes_chains_are_ours_while_our_mark_stands_beside_them() -> None:
    foreign = SAVED.replace(":SLMOPS-LOCAL-NAT - [0:0]\n", "").replace("-A POSTROUTING -j SLMOPS-LOCAL-NAT\n", "")
    hint = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"
    assert network.strangers({("iptables", "mangle"): hint, ("iptables", "nat"): SAVED}) == []
    assert network.strangers({("iptables", "mangle"): hint, ("iptables", "nat"): foreign}) == [
        "mangle KUBE-IPTABLES-HINT",
        "nat KUBE-SERVICES",
        "nat KUBE-SVC-X",
    ]


DOCKER = "-A FORWARD -j DOCKER-USER"
UFW = "-A FORWARD -j ufw-before-forward"


def test_rules_that_pass_packets_on_are_told_from_those_that_let_them_in() -> None:
    filtered = f"*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n-A INPUT -i lo -j ACCEPT\n{DOCKER}\nCOMMIT\n"
    masked = "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE\nCOMMIT\n"
    saved = {("iptables", "filter"): filtered, ("iptables", "nat"): masked, ("ip6tables", "filter"): filtered}
    assert network.passing(saved) == ["-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE", DOCKER]
    assert network.passing({}) == []


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [([], [], False), ([UFW], [UFW], False), ([UFW], [], False), ([], [DOCKER], True), ([UFW], [DOCKER, UFW], True)],
)
def test_forwarding_stays_on_for_who_came_after_us(before: list[str], now: list[str], kept: bool) -> None:
    saved = {"net.ipv4.ip_forward": "0", "kernel.panic": "0"}
    assert network.restorable(saved, before, now) == ({"kernel.panic": "0"} if kept else saved)
    on = {"net.ipv4.ip_forward": "1"}
    assert network.restorable(on, before, now) == on


def test_the_mark_comes_first_and_goes_last() -> None:
    assert network.rules().startswith(f"*nat\n:{network.MARK} ")
    assert network.TABLES[-1] == network.MARKED


@pytest.mark.parametrize(
    ("route", "taken"),
    [
        ({"dst": "10.244.0.0/24", "dev": "cni0"}, ["10.244.0.0/24 dev cni0"]),
        ({"dst": "10.96.7.3", "dev": "tun0"}, ["10.96.7.3 dev tun0"]),
        ({"dst": "10.244.0.0/24", "dev": paths.BRIDGE}, []),
        ({"dst": "10.0.0.0/8", "dev": "tun0"}, []),
        ({"dst": "default", "dev": "eth0"}, []),
        ({"dst": "fe80::/64", "dev": "eth0"}, []),
        ({"type": "unreachable", "dst": "10.96.0.0/16"}, ["10.96.0.0/16 dev ?"]),
    ],
)
def test_a_route_of_others_in_the_nodes_networks_is_seen(route: dict[str, str], taken: list[str]) -> None:
    assert network.overlapping([route]) == taken


def test_go_mod_names_the_kubernetes_version_all_replacements_follow() -> None:
    text = (paths.TOOLS_MODULE / "go.mod").read_text()
    version = tools.kubernetes_version(text)
    replaced = {line.split()[-1] for line in text.splitlines() if line.startswith("replace ")}
    assert replaced == {version.replace("v1.", "v0.", 1)}


def test_sources_follow_the_mirror() -> None:
    text = rootfs.sources("http://mirror.test/debian")
    assert "URIs: http://mirror.test/debian\n" in text
    assert "URIs: http://mirror.test/debian-security\n" in text


def test_the_default_class_has_volumes_that_wait_for_a_pod() -> None:
    assert seed.storage_class()["volumeBindingMode"] == "WaitForFirstConsumer"
    spec = seed.volume(3)["spec"]
    assert spec["storageClassName"] == seed.storage_class()["metadata"]["name"]
    assert spec["hostPath"]["path"].endswith("/volumes/3")


def test_a_reused_pid_is_not_taken_for_our_daemon() -> None:
    ours = daemons.Daemon("x", 1, "not its start time", "x")
    assert not ours.alive()


def test_a_failure_says_what_where_and_how_to_go_on(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("first\nlast words\n")
    report = Failure("x ended", log=log, hint="run again").report()
    assert report.splitlines() == [
        "failed: x ended",
        "  | first",
        "  | last words",
        f"  log: {log}",
        "  next: run again",
    ]


@pytest.mark.parametrize(
    ("text", "version"), [("go1.26.1", (1, 26)), ("go1.19.8", (1, 19)), ("", (0, 0)), ("devel go1.27", (0, 0))]
)
def test_gos_version(text: str, version: tuple[int, int]) -> None:
    assert tools.go_version(text) == version


@pytest.mark.parametrize("page", ["README.md", "e2e/localkube/README.md"])
def test_the_go_that_the_pages_ask_for_is_the_one_that_will_do(page: str) -> None:
    told = re.findall(r"\bGo (\d+)\.(\d+)", (paths.REPO / page).read_text())
    assert [(int(major), int(minor)) for major, minor in told] == [tools.OLDEST_GO]
