"""A server on this machine, and a virtual environment with clients that others wrote."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "server"))  # its harness

from server_harness import Server  # noqa: E402 - found by the line above


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder with their commands, made once per requirements file."""
    requirements = ROOT / "requirements" / "clients.txt"
    folder = ROOT / ".local" / f"clients-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    done = folder / "done"
    if not done.exists() or done.read_text() != str(folder):  # the scripts in it name the folder: a moved clone's fail
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "--require-hashes", "--no-deps", "-r", str(requirements)], check=True)
        done.write_text(str(folder))
    return folder / "bin"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log", "--slots", "4")
    yield running
    running.close()
