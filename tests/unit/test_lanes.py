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

from kit import alone
from kit.lanes import Lanes, parse

# `python -m kit.lanes` with a lock, logs and a node of its own, in the folder argv[1]; `earlier` there is the node.
MAIN = """
import sys
from pathlib import Path
from kit import alone, earlier, lanes
folder = Path(sys.argv.pop(1))
alone.LOCK, lanes.LOCAL = folder / "demo.lock", folder
def remove(kube):
    (folder / "earlier").unlink(missing_ok=True)
    return ["e2e-x"]
earlier.remove = remove
sys.exit(lanes.main())
"""
WAIT = """
import pathlib, sys, threading
try:
    pathlib.Path(sys.argv[1]).touch()
    threading.Event().wait()
except KeyboardInterrupt:
    pathlib.Path(sys.argv[2]).write_text("interrupted")
    sys.exit(1)
"""


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
    told, gate, began = tmp_path / "told", tmp_path / "gate", tmp_path / "began"
    os.mkfifo(gate)
    go_on = threading.Thread(
        target=lambda: (_until(lambda: bool(lanes.failed)), gate.write_text("go")), daemon=True
    )  # fmt: skip
    go_on.start()
    bad = ["sh", "-c", f"until test -e {began}; do sleep 0.01; done; echo the reason; exit 3"]
    other = ["sh", "-c", f"touch {began}; cat {gate}"]
    assert not lanes.run([[bad, noted(told, "same")], [other, noted(told, "other")]])
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


def main(folder: Path, *words: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """kit.lanes with these words, begun by the command `before`."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", MAIN, str(folder), *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "before", [(), ("sh", "-c", 'trap "" INT; exec "$@"', "sh")], ids=["by hand", "by a script's &"]
)
def test_a_terminated_run_interrupts_what_runs(tmp_path: Path, before: tuple[str, ...]) -> None:
    ready, told = tmp_path / "ready", tmp_path / "told"
    waits = [sys.executable, "-c", WAIT, str(ready), str(told)]
    process = main(tmp_path, *waits, "--", "touch", str(tmp_path / "next"), before=before)
    try:
        _until(ready.exists)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert told.read_text() == "interrupted"
    assert not (tmp_path / "next").exists()


def test_no_demo_begins_beside_a_run_and_nothing_of_earlier_ones_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, ready, go = (tmp_path / name for name in ("earlier", "ready", "go"))
    earlier.touch()
    os.mkfifo(go)
    process = main(tmp_path, "sh", "-c", f"test ! -e {earlier} && touch {ready} && cat {go}")
    try:
        _until(lambda: ready.exists() or process.poll() is not None)
        monkeypatch.setattr(alone, "LOCK", tmp_path / "demo.lock")
        with pytest.raises(alone.BusyError, match=r"make test \(pid \d+\) is at work"), alone.alone("make demo"):
            pass
        go.write_text("so many passed")
        said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "namespaces e2e-x" in said
    with alone.alone("make demo"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_demo_begins_before_the_commands_of_a_run_that_is_ended_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Told twice, for some are impatient; the command here is deaf to it."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    os.mkfifo(go)
    process = main(tmp_path, "sh", "-c", f"trap '' INT; touch {ready}; exec cat {go}")
    monkeypatch.setattr(alone, "LOCK", tmp_path / "demo.lock")

    def free() -> bool:
        try:
            with alone.alone("make demo"):
                return True
        except alone.BusyError:
            return False

    try:
        _until(ready.exists)
        process.send_signal(number)
        process.send_signal(number)
        if number is signal.SIGKILL:
            process.wait(20)
        assert not free()
        go.write_text("over")
        _until(free)
    finally:
        process.kill()
        process.communicate()
