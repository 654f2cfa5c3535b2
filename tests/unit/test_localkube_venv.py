"""The virtual environment is there whole, or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from localkube import paths, shell, venv
from localkube.say import Failure


class Programs:
    """Stands in for `python -m venv` and pip, which take a minute."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.problem, self.runs = folder, "", 0

    def run(self, *argv: str | Path, **_: object) -> str:
        if "venv" in argv:
            (self.folder / "bin").mkdir(parents=True)
            (self.folder / "bin/python").symlink_to(sys.executable)
            return ""
        self.runs += 1
        if self.problem:
            raise Failure(self.problem)
        return ""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    found = Programs(tmp_path / ".local/venv")
    monkeypatch.setattr(paths, "REPO", tmp_path)
    monkeypatch.setattr(paths, "LOCAL", tmp_path / ".local")
    monkeypatch.setattr(paths, "VENV", found.folder)
    monkeypatch.setattr(venv, "REQUIREMENTS", tmp_path / "dev.txt")
    (tmp_path / "dev.txt").write_text("a==1\n")
    monkeypatch.setattr(shell, "run", found.run)
    return found


def test_a_whole_one_is_made_once(programs: Programs) -> None:
    venv.ensure()
    venv.ensure()
    assert programs.runs == 1
    assert (programs.folder / "bin/python").exists()


def test_a_failed_one_leaves_nothing_and_is_made_the_next_time(programs: Programs) -> None:
    programs.problem = "no network"
    with pytest.raises(Failure, match="no network"):
        venv.ensure()
    assert not programs.folder.exists()
    programs.problem = ""
    venv.ensure()
    assert (programs.folder / "bin/python").exists()


def test_one_that_was_killed_half_way_is_made_anew(programs: Programs) -> None:
    programs.folder.mkdir(parents=True)
    (programs.folder / "half").touch()
    venv.ensure()
    assert not (programs.folder / "half").exists()


def test_other_requirements_or_a_python_that_is_gone_make_it_anew(programs: Programs) -> None:
    venv.ensure()
    venv.REQUIREMENTS.write_text("a==2\n")
    venv.ensure()
    assert programs.runs == 2
    python = programs.folder / "bin/python"
    python.unlink()
    python.symlink_to("/usr/bin/python-of-an-older-debian")
    venv.ensure()
    assert programs.runs == 3
    assert python.exists()
