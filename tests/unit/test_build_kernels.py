"""How the server's operators for onnxruntime are compiled."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "images/server/kernels/build.py"
OTHER = "int answer(void) { return 42; }\n"
pytestmark = pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="the operators are for x86-64 Linux")
compiled = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


def build(script: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), str(out)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def with_sources(folder: Path, **sources: str) -> Path:
    for name, text in sources.items():
        (folder / f"{name}.c").write_text(text)
    return Path(shutil.copy(FILE, folder))


@compiled
def test_the_library_has_what_onnxruntime_and_the_server_ask_for(tmp_path: Path) -> None:
    out = tmp_path / "slmops_kernels.so"
    done = build(FILE, out)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(out))
    assert library.RegisterCustomOps
    assert library.slmops_usable() in (0, 1)
    assert list(tmp_path.iterdir()) == [out]


@compiled
def test_all_sources_beside_it_are_one_library(tmp_path: Path) -> None:
    one = "extern int answer(void);\nint twice(void) { return 2 * answer(); }\n"
    script, out = with_sources(tmp_path, one=one, other=OTHER), tmp_path / "out.so"
    assert build(script, out, CC="cc -O0").returncode == 0
    assert ctypes.CDLL(str(out)).twice() == 84


@compiled
@pytest.mark.parametrize("wrong", ["int answer(void) { return x; }\n", "static int unused(void) { return 1; }\n"])
def test_an_error_or_a_warning_leaves_what_was_there(tmp_path: Path, wrong: str) -> None:
    script, out = with_sources(tmp_path, other=OTHER, wrong=wrong), tmp_path / "out.so"
    out.write_text("before")
    done = build(script, out)
    assert done.returncode == 1
    assert done.stderr.startswith(f"failed: {out} was not built: ")
    assert "wrong.c:1:" in done.stderr
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "other.c", "out.so", "wrong.c"]


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"CC": "no-such-compiler -m64"}, "there is no C compiler no-such-compiler (from CC)"),
        ({"CC": "", "PATH": "/no/folder"}, "there is no C compiler, cc or gcc"),
    ],
)
def test_without_a_compiler_one_line_says_so(tmp_path: Path, env: dict[str, str], why: str) -> None:
    out = tmp_path / "out.so"
    done = build(FILE, out, **env)
    assert (done.returncode, done.stderr) == (1, f"failed: {out} was not built: {why}\n")
    assert not out.exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = build(FILE, tmp_path / "none/out.so", CC="true")
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr
