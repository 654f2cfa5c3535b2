"""Which values `make install` gives to helm."""

from pathlib import Path

import pytest

from kit import chart
from kit.kubectl import KubectlError


def test_no_file_of_values_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VALUES", raising=False)
    assert chart.values_flags() == []
    monkeypatch.setenv("VALUES", "")  # as the Makefile exports it
    assert chart.values_flags() == []


def test_the_users_file_of_values_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "images.yaml"
    file.write_text("images: {}")
    monkeypatch.setenv("VALUES", str(file))
    assert chart.values_flags() == ["--values", str(file)]


def test_a_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALUES", "no/such.yaml")
    with pytest.raises(KubectlError, match=r"no/such\.yaml"):
        chart.values_flags()
