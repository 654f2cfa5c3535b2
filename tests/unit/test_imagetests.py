"""How tests get into the image that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit import imagetests


def test_the_tests_are_readable_whatever_the_clones_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = tmp_path / "clone/tests/server/test_x.py"
    test.parent.mkdir(parents=True)
    test.write_text("x")
    test.chmod(0o600)
    test.parent.chmod(0o700)
    monkeypatch.setattr(imagetests, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(imagetests, "LOCAL", tmp_path / "local")
    (tmp_path / "local").mkdir()
    with imagetests.readable_tests("trainer") as copy:
        assert (copy / "server/test_x.py").stat().st_mode & 0o777 == 0o644
        assert (copy / "server").stat().st_mode & 0o777 == 0o755
    assert list((tmp_path / "local").iterdir()) == []


def test_an_image_without_tests_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["imagetests", "sever"])
    assert imagetests.main() == 2
    assert "trainer|server" in capsys.readouterr().err
