"""The Makefile without running it: what each target would do, and which words it refuses."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from kit.kubectl import NEAR

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


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({}, set()),
        ({"NO_PROXY": "a.test,,b.test"}, {"a.test", "b.test"}),
        ({"no_proxy": "a.test"}, {"a.test"}),
        ({"NO_PROXY": "a.test", "no_proxy": "b.test,10.0.0.0/8"}, {"a.test", "b.test", "10.0.0.0/8"}),
    ],
)
def test_loopback_and_the_node_are_reached_without_a_proxy(
    said: dict[str, str], kept: set[str], tmp_path: Path
) -> None:
    others = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    rules = tmp_path / "rules.mk"  # a make below the make, as for most recipes
    rules.write_text(f'said: ; @$(MAKE) -s -f Makefile -f {rules} told\ntold: ; @echo "$$NO_PROXY;$$no_proxy"\n')
    command = ["make", "-s", "-f", "Makefile", "-f", str(rules), "said"]
    done = subprocess.run(command, cwd=ROOT, env={**others, **said}, capture_output=True, text=True, timeout=60)
    upper, lower = done.stdout.strip().split(";")
    found = upper.split(",")
    assert lower == upper
    assert len(found) == len(set(found))
    assert set(found) == {*NEAR.split(","), *kept}
