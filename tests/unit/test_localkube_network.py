"""The node's network and cgroups on machines that are not as one would like them."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from localkube import leftovers, network, paths
from localkube.say import Failure


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the node's state, and no program that does anything."""
    monkeypatch.setattr(paths, "RUN", tmp_path)
    monkeypatch.setattr(network, "_SAVED", tmp_path / "sysctl.json")
    monkeypatch.setattr(network, "_PASSING", tmp_path / "passing.json")
    missing = subprocess.CompletedProcess[str]([], 127, "", "not found")
    monkeypatch.setattr(network.shell, "attempt", lambda *_, **__: missing)
    monkeypatch.setattr(network.shell, "run", lambda *_, **__: pytest.fail("nothing is run here"))
    return tmp_path


def test_rules_that_cannot_be_removed_are_not_said_to_be_gone(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.shutil, "which", lambda _: None)
    with pytest.raises(Failure, match="iptables is gone"):
        network.tear_down()


def test_sysctls_of_which_half_was_saved_hold_up_nothing(machine: Path) -> None:
    (machine / "sysctl.json").write_text("")
    network._restore_sysctls([])
    assert not (machine / "sysctl.json").exists()


def test_sysctls_are_saved_whole_once(machine: Path) -> None:
    (machine / "sysctl.json").write_text("")
    network._save_sysctls()
    saved = json.loads((machine / "sysctl.json").read_text())
    assert saved[network.FORWARD] == network.read_sysctl(network.FORWARD)
    (machine / "sysctl.json").write_text("{}")
    network._save_sysctls()
    assert (machine / "sysctl.json").read_text() == "{}"


def chain(name: str, *, family: str = "inet", table: str = "filter", **more: str) -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, "handle": 1, **more}}


def rule(text: str, name: str = "input") -> dict[str, Any]:
    match = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": text}}
    return {"rule": {"family": "inet", "table": "filter", "chain": name, "expr": [match, {"accept": None}]}}


DROP = {"type": "filter", "prio": 0, "policy": "drop"}


@pytest.mark.parametrize(
    ("entries", "closed"),
    [
        ([chain("input", hook="input", **DROP)], ["inet filter input"]),
        ([chain("fwd", hook="forward", family="ip", table="mine", **DROP)], ["ip mine fwd"]),
        ([chain("input", hook="input", **DROP), rule("lo")], ["inet filter input"]),
        ([chain("input", hook="input", **DROP), rule(paths.BRIDGE)], []),
        ([chain("input", hook="input", **DROP), rule(paths.BRIDGE, "other")], ["inet filter input"]),
        ([chain("input", hook="input", type="filter", prio=0, policy="accept")], []),
        ([chain("output", hook="output", **DROP), chain("helper")], []),
        ([chain("input", hook="input", family="ip6", **DROP)], []),
        ([chain("FORWARD", hook="forward", family="ip", **DROP)], []),  # iptables' own, as with Docker
        ([{"metainfo": {"version": "1.0.6"}}], []),
    ],
)
def test_a_firewall_that_shuts_out_pods_is_seen(entries: list[dict[str, Any]], closed: list[str]) -> None:
    assert network.firewalls({"nftables": entries}) == closed
    assert network.firewalls({}) == []


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Version 2, the root with two of three controllers enabled below it."""
    monkeypatch.setattr(leftovers, "CGROUPS", tmp_path)
    (tmp_path / paths.CGROUP).mkdir()
    for name, text in {
        "cgroup.controllers": "cpu memory pids\n",
        "cgroup.subtree_control": "cpu memory\n",
        f"{paths.CGROUP}/cgroup.subtree_control": "",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_only_controllers_that_are_missing_are_enabled(cgroups: Path) -> None:
    leftovers.create_cgroups()
    assert (cgroups / "cgroup.subtree_control").read_text() == "+pids"
    assert (cgroups / paths.CGROUP / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_a_root_whose_controllers_are_all_enabled_is_left_alone(cgroups: Path) -> None:
    (cgroups / "cgroup.subtree_control").write_text("memory cpu pids io\n")
    leftovers.create_cgroups()
    assert (cgroups / "cgroup.subtree_control").read_text() == "memory cpu pids io\n"


def test_a_root_that_holds_processes_is_said_to(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "write_text", busy)
    with pytest.raises(Failure, match="processes run in") as caught:
        leftovers.create_cgroups()
    assert f"mkdir -p {cgroups}/init" in caught.value.report()
