"""One demo at a time, no tests beside it, and no installation below it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import run
from kit import alone, chart, lanes
from kit.kubectl import Kubectl

ROOT = Path(__file__).resolve().parents[2]
# Sets up what the test in argv[2] needs while a demo holds the lock argv[1]; nothing of this clone's node is in reach.
BESIDE_A_DEMO = """
import sys
from pathlib import Path
import pytest
from kit import kubectl
kubectl.LOCAL = Path(sys.argv[1])
from kit import alone
with alone.alone("make demo"):
    sys.exit(pytest.main(["-q", "-x", "--setup-only", "-p", "no:cacheprovider", sys.argv[2]]))
"""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """kit.lanes sets them for its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is asked of kubectl and helm: nothing answers. The lock and the results are the test's own."""
    found = list[tuple[str, ...]]()

    def record(*args: object, **_: object) -> str:
        found.append(tuple(str(each) for each in args[1:]))
        raise KeyboardInterrupt

    monkeypatch.setattr(alone, "LOCK", tmp_path / "local/demo.lock")
    monkeypatch.setattr(run, "FIGURES", tmp_path / "demo.json")
    monkeypatch.setattr(run, "DETAILS", tmp_path / "demo-details.json")
    monkeypatch.setattr(Kubectl, "run", record)
    monkeypatch.setattr(chart, "_helm", record)
    monkeypatch.setattr("sys.argv", ["chart", "install"])
    return found


@pytest.mark.parametrize("main", [run.main, chart.main, lanes.main])
def test_a_second_one_names_the_first_and_touches_nothing(
    main: object, asked: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo.json").write_text("of the first")
    with alone.alone("make demo"):
        assert callable(main)
        assert main() == 1
    assert asked == []
    assert f"make demo (pid {os.getpid()})" in capsys.readouterr().err
    assert (tmp_path / "demo.json").read_text() == "of the first"


def test_after_the_end_of_one_another_may_start(asked: list[tuple[str, ...]]) -> None:
    for name in ("make install", "x"):
        with alone.alone(name):
            assert alone.LOCK.read_text() == f"{name} (pid {os.getpid()})\n"
    assert run.main() == 130
    assert asked


@pytest.mark.parametrize(
    ("test", "begun"),
    [("e2e/scenarios/test_node.py", []), ("tests/node/test_interrupted.py", ["_alone"])],
)
def test_tests_on_the_node_do_not_start_beside_a_demo(test: str, begun: list[str], tmp_path: Path) -> None:
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_A_DEMO, str(tmp_path), test],
        cwd=ROOT,
        env={**os.environ, "CLUSTER": "local", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "did not start. In this clone make demo (pid " in done.stdout
    assert re.findall(r"SETUP +\S (\w+)", done.stdout) == begun


def test_scenarios_on_a_cluster_of_the_users_run_one_after_the_other() -> None:
    """They take the chart and its settings away and put them back, in every worker for itself."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "--collect-only", "e2e/scenarios/test_node.py"],
        cwd=ROOT,
        env={**os.environ, "CLUSTER": "current", "KUBECONFIG": os.devnull, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "CLUSTER=current: one after the other" in done.stdout
