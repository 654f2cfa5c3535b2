"""Fixtures of the artifact tests: Debian's docker-registry, a local Hub, a small disk, a small model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

IMAGES = Path(__file__).resolve().parents[2] / "images"
sys.path[:0] = [str(Path(__file__).parent), str(IMAGES / "artifacts"), str(IMAGES / "trainer")]

from artifact_support import Registry, safetensors, write  # noqa: E402  # the folder must be on the path first
from hub import Hub  # noqa: E402


def _registry(folder: Path, **options: Path) -> Registry:
    if shutil.which("docker-registry") is None:
        pytest.fail("docker-registry is missing: apt-get install docker-registry")
    registry = Registry(folder, **options)
    registry.start()
    return registry


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies, no credentials of this machine, and little patience."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "SLMOPS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLMOPS_RETRY_SECONDS", "1")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    (tmp_path / "registry").mkdir()
    server = _registry(tmp_path / "registry")
    monkeypatch.setenv("SLMOPS_PLAIN_HTTP", f"other:1, {server.host}")
    yield server
    server.stop()


@pytest.fixture
def closed_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry that lets nobody in but user ann with the password s3cret."""
    (tmp_path / "closed").mkdir()
    line = subprocess.run(["htpasswd", "-Bbn", "ann", "s3cret"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "closed/htpasswd").write_text(line)
    server = _registry(tmp_path / "closed", htpasswd=tmp_path / "closed/htpasswd")
    monkeypatch.setenv("SLMOPS_PLAIN_HTTP", server.host)
    yield server
    server.stop()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A volume of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "slmops-test", str(folder)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model folder as a trainer leaves it."""
    folder = tmp_path / "model"
    write(folder, {"model.safetensors": safetensors(), "config.json": b"{}", "sub/tokenizer.json": b'{"v":1}'})
    return folder
