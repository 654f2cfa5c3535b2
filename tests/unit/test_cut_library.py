"""What the server's image does to llama.cpp's library."""

from __future__ import annotations

import _ctypes
import ctypes
import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "images/server/cut_library.py"
spec = importlib.util.spec_from_file_location("cut_library", FILE)
assert spec
assert spec.loader
cut_library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cut_library)


def test_a_library_runs_without_what_is_cut_off(tmp_path: Path) -> None:
    whole = Path(_ctypes.__file__).read_bytes()
    cut = cut_library.cut(whole + bytes(5000))
    assert len(cut) < len(whole)
    (tmp_path / "cut.so").write_bytes(cut)
    loaded = ctypes.PyDLL(str(tmp_path / "cut.so"))
    assert loaded.PyInit__ctypes


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh", b"\x7fELF\x01\x01" + bytes(100)])
def test_another_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a 64-bit"):
        cut_library.cut(data)
