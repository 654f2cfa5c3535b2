"""The registry's keeper: room comes back by itself, and nobody loses anything over it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from artifact_support import ROOT, Registry, contents, free_port, growing, safetensors, wait_for, write

from slmops_artifacts import ArtifactError, Manifest, delete, pull, push, read_manifest, transfer, upload, waiting

CHECKPOINT = Manifest(kind="checkpoint", created="2026-01-01T00:00:00Z")


class Kept(Registry):
    """A registry under its keeper, as the image has them, but for the paths; it looks four times a second."""

    def __init__(self, folder: Path, age: float, storage: Path | None = None) -> None:
        super().__init__(folder, storage=storage)
        self._age = age
        self._short = "0.2" if storage else "0"  # however full this machine's disk is

    def command(self) -> tuple[list[str], dict[str, str]]:
        env = {
            "SLMOPS_REGISTRY_STORAGE": str(self.storage),
            "SLMOPS_REGISTRY_LOOK_SECONDS": "0.25",
            "SLMOPS_REGISTRY_AGE_SECONDS": str(self._age),
            "SLMOPS_REGISTRY_SHORT": self._short,
            "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY": str(self.storage),
            "REGISTRY_HTTP_ADDR": self.host,
            "REGISTRY_HTTP_DEBUG_ADDR": f"127.0.0.1:{free_port()}",
        }
        folder = ROOT / "images/registry"
        return [sys.executable, str(folder / "keeper.py"), "serve", str(folder / "config.yml")], env

    def stop(self) -> None:
        """As the kubelet does: the keeper takes the registry with it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(20) == 0
            self.process = None

    def children(self) -> dict[int, str]:
        """The keeper's processes with their command lines."""
        assert self.process is not None
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_text()
        return found

    def wait_for_looks(self) -> None:
        """Wait until the keeper, from now on, has begun a look for garbage and ended it."""
        begun: set[int] = set()

        def several() -> bool:
            begun.update(pid for pid, command in self.children().items() if "--dry-run" in command)
            return len(begun) > 2

        wait_for(several, 60)

    def age(self) -> None:
        """Make all files older than any push."""
        for blob in growing(self.storage, "blobs/*/*/*/data"):
            os.utime(blob, (0, 0))

    def used(self) -> int:
        return sum(growing(self.storage, "blobs/*/*/*/data").values())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Kept]:
    (tmp_path / "kept").mkdir()
    yield from running(Kept(tmp_path / "kept", getattr(request, "param", 2.0)), monkeypatch)


def running(server: Kept, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
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
    kept.wait_for_looks()
    assert "Garbage was collected" not in kept.log()
    kept.age()
    delete(f"oci://{kept.host}/a:v2")
    wait_for(lambda: "Garbage was collected" in kept.log(), 60)


@pytest.fixture
def cramped(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """One whose garbage is never old, on a volume of 4 MiB."""
    (tmp_path / "cramped").mkdir()
    yield from running(Kept(tmp_path / "cramped", 3600.0, small_disk), monkeypatch)


def begun_upload(server: Kept, size: int) -> str:
    """An upload to the registry of which so many bytes have come; where it goes on."""
    place = httpx.post(f"http://{server.host}/v2/half/blobs/uploads/", trust_env=False).headers["location"]
    taken = httpx.patch(
        place, content=bytes(size), headers={"Content-Type": "application/octet-stream"}, trust_env=False
    )
    assert taken.status_code == 202
    return str(taken.headers["location"])


def test_where_room_is_short_young_files_go_as_soon_as_nobody_uploads(cramped: Kept, tmp_path: Path) -> None:
    """What is being pushed is not named yet, either."""

    def push_checkpoint(fill: bytes) -> str:
        folder = write(tmp_path / "one", {"weights.safetensors": safetensors(1120 << 10, fill)})
        return push(folder, f"oci://{cramped.host}/run:ckpt", CHECKPOINT)[0]

    delete(push_checkpoint(b"1"))
    cramped.wait_for_looks()
    assert "Garbage was collected" not in cramped.log()  # there is room
    place = begun_upload(cramped, 1 << 10)
    last = [push_checkpoint(fill) for fill in (b"2", b"3")]
    cramped.wait_for_looks()
    assert "Garbage was collected" not in cramped.log()
    assert httpx.delete(place, trust_env=False).status_code == 204
    wait_for(lambda: cramped.used() < (5 << 20) / 2, 60)
    for number, uri in enumerate(last):
        pull(uri, tmp_path / f"out-{number}")
    cramped.wait_for_looks()
    assert cramped.log().count("Garbage was collected") == 1  # what is named is none, however short the room is


def test_what_a_full_registry_took_of_an_upload_goes_when_nothing_more_comes(cramped: Kept, tmp_path: Path) -> None:
    source = write(tmp_path / "large", {"model.safetensors": safetensors(6 << 20)})
    with pytest.raises(ArtifactError) as caught:
        push(source, f"oci://{cramped.host}/a:v1", CHECKPOINT, patience=0.1)
    assert caught.value.reason == "DiskFull"
    cramped.wait_for_looks()
    [(left, size)] = growing(cramped.storage, "_uploads/*/data").items()
    assert size > 3 << 20
    os.utime(left, (0, 0))
    wait_for(lambda: not left.parent.exists(), 60)
    fits = write(tmp_path / "fits", {"model.safetensors": safetensors(3 << 20)})
    push(fits, f"oci://{cramped.host}/a:v1", CHECKPOINT)
    assert growing(cramped.storage, "_uploads/*/data") == {}


def test_an_upload_goes_on_where_a_collection_found_it(
    kept: Kept, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comes while a large model is uploaded: the registry takes each chunk once, and no part of one is left."""
    old, _ = push(model, f"oci://{kept.host}/old:v1", CHECKPOINT)
    sent: list[str] = []
    send = transfer.Http.send

    def recording(http: transfer.Http, method: str, url: str, headers: Any, body: Any = None) -> httpx.Response:
        response = send(http, method, url, headers, body)
        if "Content-Range" in headers:
            sent.append(headers["Content-Range"])
        return response

    def away() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", kept.port)) != 0

    once = [9 << 20]

    def progress(done: int, _: int) -> None:
        if once and done >= once[0]:
            once.clear()
            kept.age()
            delete(old)
            wait_for(away, 60)  # the registry ends while this chunk is on its way

    monkeypatch.setattr(upload, "CHUNK_SIZE", 2 << 20)
    monkeypatch.setattr(transfer.Http, "send", recording)
    source = write(tmp_path / "big", {"model.safetensors": safetensors(16 << 20, bytes(range(251)))})
    pauses: list[float] = []

    def impatient(_: ArtifactError, seconds: float) -> None:
        time.sleep(seconds if pauses else 0)  # it asks once before the registry can be there again
        pauses.append(seconds)

    with waiting(impatient):
        uri, _ = push(source, f"oci://{kept.host}/big:v1", CHECKPOINT, progress=progress)
    assert len(pauses) > 1
    assert "Garbage was collected" in kept.log()
    assert len(sent) == len(set(sent)) == 9
    pull(uri, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)
    assert growing(kept.storage, "_uploads/*/data") == {}


def test_garbage_that_cannot_be_collected_is_said_once(kept: Kept, model: Path) -> None:
    _, pushed = push(model, f"oci://{kept.host}/a:v1", CHECKPOINT)
    kept.blob(pushed.digest.removeprefix("sha256:")).write_bytes(b"")
    wait_for(lambda: "Garbage cannot be collected" in kept.log(), 60)
    kept.wait_for_looks()
    (said,) = [line for line in kept.log().splitlines() if "Garbage cannot be collected" in line]
    assert pushed.digest in said


def test_a_registry_that_dies_takes_its_keeper_with_it(kept: Kept) -> None:
    """So that the kubelet sees it."""
    assert kept.process is not None
    os.kill(min(kept.children()), signal.SIGKILL)
    assert kept.process.wait(20) != 0
    kept.process = None
    with pytest.raises(ArtifactError):
        read_manifest(f"oci://{kept.host}/a:v1", patience=0.1)


def test_other_commands_are_the_registry_s_own() -> None:
    command = [sys.executable, str(ROOT / "images/registry/keeper.py"), "--version"]
    assert "docker" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
