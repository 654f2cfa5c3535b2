"""The registry's keeper: room comes back by itself, and nobody loses anything over it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from artifact_support import ROOT, Registry, contents, growing, safetensors, wait_for, write

from slmops_artifacts import ArtifactError, Manifest, delete, pull, push, read_manifest

CHECKPOINT = Manifest(kind="checkpoint", created="2026-01-01T00:00:00Z")


class Kept(Registry):
    """A registry under its keeper, which looks four times a second."""

    def __init__(self, folder: Path, age: float) -> None:
        super().__init__(folder)
        self._age = age

    def command(self) -> tuple[list[str], dict[str, str]]:
        found = {"STORAGE": str(self.storage), "LOOK_SECONDS": "0.25", "AGE_SECONDS": str(self._age)}
        env = {f"SLMOPS_REGISTRY_{name}": value for name, value in found.items()}
        return [sys.executable, str(ROOT / "images/registry/keeper.py"), "serve", str(self.config)], env

    def stop(self) -> None:
        """As the kubelet does: the keeper takes the registry with it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(20) == 0
            self.process = None

    def used(self) -> int:
        return sum(growing(self.storage, "blobs/*/*/*/data").values())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Kept]:
    (tmp_path / "kept").mkdir()
    server = Kept(tmp_path / "kept", getattr(request, "param", 0.0))
    server.start()
    monkeypatch.setenv("SLMOPS_PLAIN_HTTP", server.host)
    monkeypatch.setenv("SLMOPS_RETRY_SECONDS", "60")
    yield server
    server.stop()


def test_room_comes_back_and_what_is_named_stays(kept: Kept, tmp_path: Path) -> None:
    folder = write(tmp_path / "one", {"weights.safetensors": safetensors(1 << 20, b"1"), "same.json": b"{}"})
    first, _ = push(folder, f"oci://{kept.host}/run:ckpt", CHECKPOINT)
    write(folder, {"weights.safetensors": safetensors(1 << 20, b"2")})
    second, _ = push(folder, f"oci://{kept.host}/run:ckpt", CHECKPOINT)
    assert kept.used() > 2 << 20
    delete(first)
    wait_for(lambda: kept.used() < 2 << 20, 60)
    pull(second, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    assert "Garbage was collected" in kept.log()


@pytest.mark.parametrize("kept", [3600.0], indirect=True)
def test_young_files_disturb_no_registry(kept: Kept, model: Path) -> None:
    uri, _ = push(model, f"oci://{kept.host}/a:v1", CHECKPOINT)
    delete(uri)
    push(model, f"oci://{kept.host}/a:v2", CHECKPOINT)
    assert "Garbage was collected" not in kept.log()
    for blob in kept.storage.rglob("blobs/*/*/*/data"):
        os.utime(blob, (0, 0))
    delete(f"oci://{kept.host}/a:v2")
    wait_for(lambda: "Garbage was collected" in kept.log(), 60)


def test_a_registry_that_dies_takes_its_keeper_with_it(kept: Kept) -> None:
    """So that the kubelet sees it."""
    assert kept.process is not None
    children = Path(f"/proc/{kept.process.pid}/task/{kept.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert kept.process.wait(20) != 0
    kept.process = None
    with pytest.raises(ArtifactError):
        read_manifest(f"oci://{kept.host}/a:v1", patience=0.1)


def test_other_commands_are_the_registry_s_own() -> None:
    command = [sys.executable, str(ROOT / "images/registry/keeper.py"), "--version"]
    assert "docker" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
