"""The local node after the worst: daemons, `up` and builds killed in their middle. Runs last: it empties the node."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit import chart, pods
from kit.alone import BusyError, alone
from kit.kubectl import ROOT, Kubectl, wait_for
from localkube import daemons, images, leftovers, mounts, network, outside, paths

COMMAND = ["python3", "e2e/localkube"]


def localkube(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def healthy() -> bool:
    return localkube("status").returncode == 0


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """No demo beside these tests."""
    try:
        with alone("make test"):
            yield
    except BusyError as problem:
        pytest.exit(f"The tests of the node did not start. {problem}", returncode=1)


@pytest.fixture(autouse=True)
def _up_again() -> Iterator[None]:
    """A healthy node before and after each test."""
    for when in ("before", "after"):
        done = localkube("up")
        assert done.returncode == 0, f"{when}: {done.stderr}"
        if when == "before":
            yield


def run_pod() -> None:
    """A pod with a token and a volume in memory: both are mounts that a killed kubelet leaves."""
    kube = Kubectl("default")
    assert localkube("build", "operator").returncode == 0
    wait_for("the namespace has its account", lambda: kube.get("serviceaccount", "default"), 30)
    made = pods.spec(
        chart.local_images()["operator"],
        ["python3", "-c", "import time; time.sleep(600)"],
        mounts={"/memory": {"emptyDir": {"medium": "Memory"}}},
        token=True,
    )
    kube.apply(pods.pod("survivor", made))
    wait_for("the pod runs", lambda: pods.phase(kube, "survivor") == "Running", 60)


def kill_daemons() -> None:
    for daemon in daemons.recorded(paths.CLUSTER.pids).values():
        if daemon.alive():
            os.kill(daemon.pid, signal.SIGKILL)


def test_a_node_whose_daemons_were_killed_comes_up_with_its_images() -> None:
    run_pod()
    before = chart.local_images()
    kill_daemons()
    assert not healthy()
    done = localkube("up")
    assert done.returncode == 0, done.stderr
    assert healthy()
    assert Kubectl("default").get("pod", "survivor") is None
    assert chart.local_images() == before
    run_pod()


def test_up_that_is_killed_at_any_moment_goes_on_the_next_time() -> None:
    kill_daemons()
    for word in ("clearing what is left", "starting the control plane", "starting the node"):
        with subprocess.Popen([*COMMAND, "up"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any(word in line for line in process.stderr), f"never said: {word}"
            process.kill()
    assert localkube("up").returncode == 0
    run_pod()


@pytest.fixture
def changed() -> Iterator[Callable[[], None]]:
    """Changes what the operator's image is made of, anew at each call; afterwards both are as they were."""
    added = ROOT / "operator/slmops/interrupted.txt"

    def change() -> None:
        added.write_text(secrets.token_hex())

    yield change
    added.unlink(missing_ok=True)
    assert localkube("build", "operator").returncode == 0


def killed_build(what: str, reached: Callable[[], bool]) -> None:
    """`localkube build operator`, killed with all that it started once `reached`."""
    with subprocess.Popen(
        [*COMMAND, "build", "operator"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            wait_for(what, lambda: process.poll() is None and reached(), 60, every=0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_build_that_is_killed_at_any_moment_is_done_the_next_time(changed: Callable[[], None]) -> None:
    log = paths.LOG / "build-operator.log"
    before = chart.local_images()["operator"]
    changed()
    log.unlink(missing_ok=True)
    killed_build("it builds", lambda: log.exists() and "COPY operator/slmops" in log.read_text())
    assert chart.local_images()["operator"] == before
    assert localkube("build", "operator").returncode == 0
    built = chart.local_images()["operator"]
    assert built == images.reference("operator") != before
    changed()
    killed_build("it loads", lambda: any(paths.WORK.glob("load-*/blobs")))
    assert chart.local_images()["operator"] == built
    Kubectl("default").delete("pod", "survivor")
    run_pod()
    assert chart.local_images()["operator"] == images.reference("operator") != built
    assert not paths.WORK.exists()


@pytest.mark.parametrize("killed", [False, True], ids=["healthy", "killed"])
def test_down_leaves_nothing_on_the_machine(killed: bool) -> None:
    run_pod()
    ours = [daemon.pid for daemon in daemons.recorded(paths.CLUSTER.pids).values()]
    sysctls = json.loads(network._SAVED.read_text())  # as they were before `up`
    if killed:
        kill_daemons()
    done = localkube("down")
    assert done.returncode == 0, done.stderr
    assert not [pid for pid in ours if daemons.start_time(pid)]
    assert not [path for path in (paths.RUN, paths.STATE, paths.LOCK, paths.BUILDAH_RUN) if path.exists()]
    # Groups of others come and go meanwhile: `glob` fails on one that does.
    assert not [folder for folder, names, _ in os.walk(leftovers.CGROUPS) if paths.CGROUP in names]
    assert not [place for folder in (paths.RUN, paths.STATE, paths.CACHE) for place in mounts.below(folder)]
    assert not Path(f"/sys/class/net/{paths.BRIDGE}").exists()
    for tool, table in network.TABLES:
        saved = subprocess.run([f"{tool}-save", "-t", table], capture_output=True, text=True).stdout
        assert not [chain for chain in network.CHAIN.findall(saved) if chain.startswith(("KUBE-", network.OWNED))]
    for name, patterns in outside.PLACES.items():
        place = Path("/") / name
        assert not (place.is_dir() and outside.only_ours(place, patterns)), place
    routes = json.loads(subprocess.run(["ip", "-json", "route"], capture_output=True, text=True, check=True).stdout)
    assert not [route for route in routes if route.get("dev") == paths.BRIDGE]
    assert {name: network.read_sysctl(name) for name in sysctls} == sysctls
