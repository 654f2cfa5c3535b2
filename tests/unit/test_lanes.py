"""Commands side by side: order in a lane, what a failure and an interrupt do."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.lanes import Lanes, parse

OK, BAD = ["true"], ["sh", "-c", "echo the reason; exit 3"]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def lanes(tmp_path: Path, said: list[str]) -> Lanes:
    return Lanes(tmp_path / "lanes", said.append)


def noted(path: Path, text: str) -> list[str]:
    return ["sh", "-c", f"echo {text} >> {path}"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("a 1 -- b / c", [[["a", "1"], ["b"]], [["c"]]]),
        ("a", [[["a"]]]),
        ("a / b / c -- d", [[["a"]], [["b"]], [["c"], ["d"]]]),
    ],
)
def test_lanes_are_read(arguments: str, found: list[list[list[str]]]) -> None:
    assert parse(arguments.split()) == found


def test_a_lane_goes_on_when_its_command_has_succeeded(lanes: Lanes, said: list[str], tmp_path: Path) -> None:
    told = tmp_path / "told"
    assert lanes.run([[noted(told, "one"), noted(told, "two"), ["echo", "so many passed"]]])
    assert told.read_text().split() == ["one", "two"]
    assert "echo 'so many passed': so many passed" in said[-1]


def test_lanes_run_at_the_same_time(lanes: Lanes, tmp_path: Path) -> None:
    meet = tmp_path / "meet"
    os.mkfifo(meet)  # either end waits for the other
    assert lanes.run([[["sh", "-c", f"echo x > {meet}"]], [["sh", "-c", f"cat {meet}"]]])


def test_after_a_failure_no_command_is_begun_and_its_log_is_shown(
    lanes: Lanes, said: list[str], tmp_path: Path
) -> None:
    told, gate = tmp_path / "told", tmp_path / "gate"
    os.mkfifo(gate)
    threading.Thread(target=lambda: (_until(lambda: bool(lanes.failed)), gate.write_text("go"))).start()
    assert not lanes.run([[BAD, noted(told, "same")], [["cat", str(gate)], noted(told, "other")]])
    assert not told.exists()
    assert "the reason" in said
    failure = next(line for line in said if "failed:" in line)
    assert "exit status 3" in failure
    assert Path(failure.split()[-1]).read_text() == "the reason\n"
    assert any("'cat'" in line or "cat " in line for line in said if "failed" not in line)  # went on to its end


def test_a_command_that_is_not_there_is_a_failure(lanes: Lanes, said: list[str]) -> None:
    assert not lanes.run([[["no-such-program"]]])
    assert "no-such-program" in said[-1]


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_terminated_run_interrupts_what_runs(tmp_path: Path) -> None:
    ready, told = tmp_path / "ready", tmp_path / "told"
    waits = f"trap 'echo interrupted > {told}; exit 1' INT; echo > {ready}; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [sys.executable, "-m", "kit.lanes", "sh", "-c", waits, "--", "touch", str(tmp_path / "next")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    _until(ready.exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert told.read_text() == "interrupted\n"
    assert not (tmp_path / "next").exists()
