"""The virtual environment for tests and tools: there whole, or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

from localkube import packages, paths, shell
from localkube.say import Failure, step

REQUIREMENTS = paths.REPO / "requirements" / "dev.txt"


def ensure() -> None:
    """Make it unless it is there, works and has these requirements. Raises Failure."""
    if _is_ready():
        return
    with shell.locked(paths.LOCAL / "venv.lock", inherited=True):
        if not _is_ready():
            _make()


def _is_ready() -> bool:
    # A new Python on the machine leaves links to one that is gone.
    return _stamp().exists() and shell.attempt(paths.VENV / "bin" / "python", "-c", "").returncode == 0


def _make() -> None:
    step(f"setting up {paths.VENV.relative_to(paths.REPO)}")
    if importlib.util.find_spec("ensurepip") is None:
        packages.install(["python3-venv"])
    shutil.rmtree(paths.VENV, ignore_errors=True)
    pip = (str(paths.VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check")
    log = paths.LOG / "venv.log"
    hint = "check that the Python package index is reachable (pip config list), then run again"
    try:
        shell.run(sys.executable, "-m", "venv", paths.VENV, log=log, hint="see the log, then run again")
        shell.run(*pip, "--require-hashes", "-r", REQUIREMENTS, log=log, doing="pip install", hint=hint)
    except (Failure, KeyboardInterrupt):
        shutil.rmtree(paths.VENV, ignore_errors=True)
        raise
    _stamp().touch()
    step("the virtual environment is ready")


def _stamp() -> Path:
    return paths.VENV / f"ready-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
