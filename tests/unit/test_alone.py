"""One demo at a time, and no installation below it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from demo import run
from kit import alone, chart, earlier
from kit.kubectl import Kubectl


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


@pytest.mark.parametrize("main", [run.main, chart.main, earlier.main])
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
