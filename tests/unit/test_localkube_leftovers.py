"""What the local cluster leaves outside its own folders, and what it may not take along."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from localkube import bare, daemons, mounts, outside, paths, tools
from localkube.say import Failure


def place(machine: Path, *names: str) -> None:
    for name in names:
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text("")


@pytest.fixture(autouse=True)
def _no_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "kubernetes_beside", list)


OURS = (
    "var/lib/kubelet/device-plugins/kubelet.sock",
    "var/lib/kubelet/device-plugins/kubelet_internal_checkpoint",
    "var/lib/containers/cache/blob-info-cache-v1.boltdb",
    "etc/cni/net.d/cni.lock",
)


def test_places_with_nothing_but_ours_go(tmp_path: Path) -> None:
    place(tmp_path, *OURS)
    (tmp_path / "usr/libexec/kubernetes/kubelet-plugins/volume/exec").mkdir(parents=True)
    link = tmp_path / "var/log/containers/pod_ns_c-1.log"
    link.parent.mkdir(parents=True)
    link.symlink_to(paths.POD_LOGS / "ns_pod_uid/c/0.log")
    outside.clear(tmp_path)
    assert [str(p) for p in tmp_path.rglob("*") if not p.is_dir()] == []
    assert not (tmp_path / "var/lib/kubelet").exists()
    assert not (tmp_path / "usr/libexec/kubernetes").exists()
    outside.clear(tmp_path)


@pytest.mark.parametrize(
    "foreign",
    [
        "var/lib/kubelet/config.yaml",
        "var/lib/containers/storage/overlay/x",
        "etc/cni/net.d/10-flannel.conflist",
        "var/lib/cni/results/other-1-eth0",
        "var/log/containers/other.log",
    ],
)
def test_a_place_that_others_use_stays_whole(tmp_path: Path, foreign: str) -> None:
    place(tmp_path, *OURS, foreign)
    outside.clear(tmp_path)
    assert (tmp_path / foreign).exists()
    theirs = "/".join(foreign.split("/")[:3])
    assert {name for name in OURS if name.startswith(theirs)} == {
        str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()
    } - {foreign}


def test_beside_another_node_nothing_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "kubernetes_beside", lambda: [1])
    place(tmp_path, *OURS)
    outside.clear(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(OURS)


def test_results_of_our_pods_go_and_those_of_others_stay(tmp_path: Path) -> None:
    results = tmp_path / "var/lib/cni/results"
    results.mkdir(parents=True)
    (results / "slmops-1-eth0").write_text(f'{{"netns": "{paths.RUN}/containerd/netns/cni-1"}}')
    (results / "k3s-1-eth0").write_text('{"netns": "/run/netns/cni-1"}')
    outside.clear(tmp_path)
    assert [p.name for p in results.iterdir()] == ["k3s-1-eth0"]


def test_sockets_of_dead_shims_go_and_those_in_use_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run/containerd/s"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "dead"))
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(folder / "alive"))
        outside.clear(tmp_path)
        assert [p.name for p in folder.iterdir()] == ["alive"]
    outside.clear(tmp_path)
    assert not (tmp_path / "run/containerd").exists()


def test_api_servers_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    me = os.getpid()
    for pid, started in [(process.pid, "1"), (me, daemons.start_time(me))]:
        bare.owned(tmp_path, pid).mkdir()
        (bare.owned(tmp_path, pid) / "lock").touch()
        (bare.owned(tmp_path, pid) / "owner").write_text(started)
    bare.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f"apiserver-{me}"]


def test_an_api_server_whose_owners_pid_is_anothers_by_now_is_swept(tmp_path: Path) -> None:
    root = bare.owned(tmp_path, os.getpid())
    root.mkdir()
    (root / "lock").touch()
    bare.sweep(tmp_path)
    assert root.exists()  # it has just been made
    (root / "owner").write_text("1")
    bare.sweep(tmp_path)
    assert not root.exists()


def test_a_folder_with_files_of_the_users_is_neither_taken_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "ensure", lambda _names: None)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(Failure, match="is not empty"):
        bare.up(tmp_path)
    bare.down(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_mounts_are_seen_through_a_link(tmp_path: Path) -> None:
    found = mounts.below(Path("/dev"))
    assert found, "every Linux has mounts below /dev"
    (tmp_path / "dev").symlink_to("/dev")
    assert mounts.below(tmp_path / "dev") == found
    assert mounts.below(tmp_path) == []


def test_a_cache_behind_a_link_has_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to("disk")
    code = "from localkube import paths; print(paths.CACHE, paths.CONTAINERD_ROOT)"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(paths.REPO / "e2e")}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    cache = tmp_path.resolve() / "disk/slmops"
    assert said.split() == [str(cache), str(cache / "containerd")]
