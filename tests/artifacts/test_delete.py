"""What is deleted is gone, what is not stays whole, and a registry's garbage collection harms no push."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from artifact_support import Registry, contents, safetensors, write

from slmops_artifacts import ArtifactError, Manifest, cli, delete, oci, pinned, pull, push, read_manifest

CHECKPOINT = Manifest(kind="checkpoint", created="2026-01-01T00:00:00Z")


def collect_garbage(registry: Registry) -> None:
    subprocess.run(["docker-registry", "garbage-collect", str(registry.config)], check=True, capture_output=True)


def test_only_what_was_named_goes_and_its_room_with_it(registry: Registry, tmp_path: Path) -> None:
    uri = f"oci://{registry.host}/run:ckpt"
    folder = write(tmp_path / "one", {"weights.safetensors": safetensors(1 << 20, b"1"), "same.json": b"{}"})
    first, _ = push(folder, uri, CHECKPOINT)
    write(folder, {"weights.safetensors": safetensors(1 << 20, b"2")})
    second, _ = push(folder, uri, CHECKPOINT)
    assert delete(first)
    assert delete(first)  # twice is no error
    assert read_manifest(first) is None
    used = sum(file.stat().st_size for file in registry.storage.rglob("data"))
    registry.stop()
    collect_garbage(registry)
    registry.start()
    assert used - sum(file.stat().st_size for file in registry.storage.rglob("data")) >= 1 << 20
    pull(second, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    assert delete(uri)
    assert read_manifest(uri) is None
    assert delete(uri)


def test_a_registry_that_allows_no_deletion(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "strict").mkdir()
    server = Registry(tmp_path / "strict", deletes=False)
    server.start()
    try:
        monkeypatch.setenv("SLMOPS_PLAIN_HTTP", server.host)
        uri, manifest = push(model, f"oci://{server.host}/a:v1", CHECKPOINT)
        assert delete(uri) is False
        assert cli.main(["delete", uri]) == 3
        assert "allows no removal" in capsys.readouterr().err
        assert read_manifest(uri) == manifest
    finally:
        server.stop()


def test_garbage_collection_between_the_files_and_their_manifest(
    registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_manifest = oci._Repository.put_manifest
    passes = 0

    def lose_then_put(self: oci._Repository, document: bytes) -> str | None:
        nonlocal passes
        passes += 1
        if passes == 1:
            registry.stop()
            collect_garbage(registry)  # nothing names the files yet
            registry.start()
        return put_manifest(self, document)

    monkeypatch.setattr(oci._Repository, "put_manifest", lose_then_put)
    monkeypatch.setenv("SLMOPS_RETRY_SECONDS", "20")
    uri, _ = push(model, f"oci://{registry.host}/a:v1", CHECKPOINT)
    assert passes == 2
    pull(uri, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


def test_folders_of_ours_go_and_others_stay(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_PVC_ROOT", str(tmp_path))
    (tmp_path / "claim").mkdir()
    uri, manifest = push(model, "pvc://claim/run/ckpt", CHECKPOINT)
    assert delete(f"{uri}@sha256:{'0' * 64}")  # that content is not there
    assert read_manifest(uri) == manifest
    assert delete(uri)
    assert list((tmp_path / "claim/run").iterdir()) == []
    assert delete(uri)
    write(tmp_path / "claim/mine", {"notes.txt": b"mine"})
    with pytest.raises(ArtifactError, match="not an artifact of ours"):
        delete("pvc://claim/mine")
    assert contents(tmp_path / "claim/mine") == {"notes.txt": b"mine"}


def test_a_killed_deletion_is_finished_by_the_next_push(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMOPS_PVC_ROOT", str(tmp_path))
    (tmp_path / "claim").mkdir()
    uri, _ = push(model, "pvc://claim/ckpt", CHECKPOINT)

    class PowerCut(BaseException):
        """Nothing gets to run after it."""

    def cut(path: Path) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(PowerCut):
            delete(uri)
    assert read_manifest(uri) is None
    push(model, uri, CHECKPOINT)
    assert [item.name for item in (tmp_path / "claim").iterdir()] == ["ckpt"]


def test_a_pinned_uri_names_the_content(registry: Registry, model: Path) -> None:
    uri, manifest = push(model, f"oci://{registry.host}/a:v1", CHECKPOINT)
    assert pinned(f"oci://{registry.host}/a:v1", manifest) == uri
    commit = Manifest(kind="model", annotations={"dev.slmops.source": "hf://org/a@" + "0" * 40})
    assert pinned("hf://org/a@main", commit) == "hf://org/a@" + "0" * 40
    assert pinned("pvc://claim/a", manifest) == "pvc://claim/a"
