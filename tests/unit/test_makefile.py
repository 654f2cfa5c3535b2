"""The Makefile without running it: what each target would do, and which words it refuses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("cluster", ["curent", "", "local current", "LOCAL"])
def test_a_cluster_that_is_neither_is_refused_by_name(cluster: str) -> None:
    done = make("status", f"CLUSTER={cluster}")
    assert done.returncode != 0
    assert f'CLUSTER is "local" or "current", not "{cluster}"' in done.stderr


@pytest.mark.parametrize("target", ["demo", "e2e", "install", "uninstall"])
def test_your_own_cluster_gets_no_node_and_no_build(target: str) -> None:
    done = make(target, "CLUSTER=current")
    assert done.returncode == 0, done.stderr
    assert not re.search(r"localkube (up|build|down)", done.stdout)


LOCAL = {"status", "up", "down", "images", "purge", "test", "components", "clients", "bench", "bench-serving"}


@pytest.mark.parametrize("target", sorted(LOCAL))
def test_what_is_about_the_local_node_is_refused_on_another_cluster(target: str) -> None:
    done = make(target, "CLUSTER=current")
    assert done.returncode != 0
    assert "CLUSTER=current" in done.stderr


def test_nothing_else_touches_the_local_node() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in set(phony.split()) - LOCAL:
        done = make(target, "CLUSTER=current")
        assert done.returncode == 0, done.stderr
        assert not re.search(r"-m localkube (?!venv|debs)|kit\.(bench|imagetests|earlier)", done.stdout), target


def test_the_demo_brings_its_own_node_and_images() -> None:
    done = make("demo", "CLUSTER=local")
    assert re.search(r"localkube up\b", done.stdout)
    assert re.search(r"localkube build operator trainer server router registry prometheus\b", done.stdout)


def test_help_tells_of_every_target_that_is_for_people() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", text, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert set(phony.split()) == targets
    command = ["make", "--no-print-directory", "help"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert {line.split()[0] for line in listed.splitlines()} == targets - {"debs"}


@pytest.mark.parametrize("target", ["e2e", "components"])
def test_tests_run_beside_nothing_that_earlier_runs_left(target: str) -> None:
    lines = make(target, "CLUSTER=local").stdout.splitlines()
    removed = next(number for number, line in enumerate(lines) if "kit.earlier" in line)
    assert removed < next(number for number, line in enumerate(lines) if re.search(r"scenarios|kit\.imagetests", line))


def test_your_own_cluster_keeps_its_namespaces() -> None:
    assert "kit.earlier" not in make("e2e", "CLUSTER=current").stdout
