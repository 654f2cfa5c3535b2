"""A run's checkpoints in a real registry: the last two, never fewer than are needed, never more."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from artifact_support import Registry, contents, failing, safetensors, write

from slmops_artifacts import Manifest, folder, oci, push, read_manifest, sent, transfer
from slmops_trainer import answers, checkpoints, teacher
from slmops_trainer.checkpoints import Checkpoints
from slmops_trainer.failure import RunFailure

REPOSITORY = "ml/tune"


class Run:
    """One run; `pod()` is its next pod, with an empty disk."""

    def __init__(self, uri: str, folder: Path, uid: str = "uid-1") -> None:
        self.uri, self._folder, self._uid, self._pods = uri, folder, uid, 0

    def pod(self) -> Checkpoints:
        self._pods += 1
        return Checkpoints(self.uri, self._folder / f"{self._uid}-pod-{self._pods}", self._uid, f"start {self._pods}")


def save(pod: Checkpoints, step: int) -> None:
    write(pod.folder, {"training/weights.safetensors": safetensors(64, b"%d" % step), "training/same.json": b"{}"})
    pod.save(patience=5)


def loaded(pod: Checkpoints) -> int | None:
    """The step that the pod goes on from."""
    folder = pod.load()
    return int(contents(folder)["training/weights.safetensors"][-1:]) if folder else None


def kept(registry: Registry) -> int:
    """How many manifests the registry has."""
    revisions = registry.storage / f"docker/registry/v2/repositories/{REPOSITORY}/_manifests/revisions/sha256"
    return len(list(revisions.glob("*/link"))) if revisions.exists() else 0


@pytest.fixture
def run(registry: Registry, tmp_path: Path) -> Run:
    return Run(f"oci://{registry.host}/{REPOSITORY}:ckpt-1", tmp_path)


def test_a_long_run_leaves_two(run: Run, registry: Registry) -> None:
    pod = run.pod()
    assert loaded(pod) is None
    for step in range(1, 5):
        save(pod, step)
    assert kept(registry) == 2
    pod = run.pod()
    assert loaded(pod) == 4
    for step in range(5, 8):
        save(pod, step)
        assert kept(registry) == 2
    assert loaded(run.pod()) == 7


def test_nothing_new_is_nothing_sent(run: Run, registry: Registry) -> None:
    pod = run.pod()
    pod.load()
    save(pod, 1)
    before = read_manifest(run.uri)
    pod.save()
    assert read_manifest(run.uri) == before
    assert kept(registry) == 1


@pytest.mark.parametrize("kind", ["registry", "volume"])
def test_a_save_costs_what_is_new_and_not_all_that_was_saved_before(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of a run that asks for days there are hundreds of thousands of answers, and a save every five seconds."""
    hashed: list[int] = []
    copied: list[str] = []
    looked_for: list[str] = []
    hash_file, copy, has = sent.hash_file, folder._copy, oci._Repository._has
    monkeypatch.setattr(sent, "hash_file", lambda path: (hashed.append(path.stat().st_size), hash_file(path))[1])
    monkeypatch.setattr(folder, "_copy", lambda *given: (copied.append(given[1]), copy(*given))[1])
    monkeypatch.setattr(oci._Repository, "_has", lambda it, sha256: (looked_for.append(sha256), has(it, sha256))[1])
    uri = f"oci://{registry.host}/{REPOSITORY}:ckpt-1" if kind == "registry" else f"file://{tmp_path}/ckpt"
    run = Run(uri, tmp_path)
    pod = run.pod()
    pod.load()
    store = answers.Answers(pod.folder / answers.PART)
    for number in range(60):
        hashed.clear(), copied.clear(), looked_for.clear()
        store.add(f"key {number}", teacher.Reply("x" * 1000, "stop", 3))
        store.seal()
        pod.save(patience=5)
    assert 1000 < sum(hashed) < 10 * 1100  # of 60,000: the new chunk, and those hashed as fast as the clock ticks
    assert len(looked_for) == (2 if kind == "registry" else 0)  # the new chunk, and the document that lists them
    assert copied == ([] if kind == "registry" else ["generation/small-000061.jsonl"])
    fresh = run.pod()
    assert contents(fresh.load() or tmp_path) == contents(pod.folder)


def test_what_the_registry_lost_between_two_saves_is_sent_again(run: Run, registry: Registry) -> None:
    pod = run.pod()
    pod.load()
    save(pod, 1)
    registry.blob(hash_of(pod.folder / "training/same.json")).unlink()
    save(pod, 2)
    assert loaded(run.pod()) == 2


@pytest.mark.parametrize("links", [True, False])
def test_a_published_file_that_others_changed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(sent.os, "link", Mock(side_effect=OSError(errno.EPERM, "Operation not permitted")))
    run = Run(f"file://{tmp_path}/ckpt", tmp_path)
    pod = run.pod()
    pod.load()
    save(pod, 1)
    published = tmp_path / "ckpt/training/same.json"
    before = published.stat().st_ino
    save(pod, 2)
    assert (published.stat().st_ino == before) == links
    published.write_bytes(b"[]")
    save(pod, 3)
    assert published.read_bytes() == b"{}"
    assert loaded(run.pod()) == 3


@pytest.mark.parametrize("harm", ["changed", "lost"])
def test_a_checkpoint_that_the_store_damaged_costs_one_step_back(run: Run, registry: Registry, harm: str) -> None:
    pod = run.pod()
    pod.load()
    for step in (1, 2, 3):
        save(pod, step)
    digest = hash_of(pod.folder / "training/weights.safetensors")
    blob = registry.blob(digest)
    if harm == "changed":
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    else:
        blob.unlink()
    pod = run.pod()
    assert loaded(pod) == 2
    save(pod, 4)
    assert kept(registry) == 2
    assert loaded(run.pod()) == 4


@pytest.mark.parametrize("harm", ["changed", "garbled", "lost"])
def test_a_damaged_older_checkpoint_harms_no_newer_one(
    run: Run, registry: Registry, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(checkpoints, "QUICK", 1.0)
    pod = run.pod()
    pod.load()
    for step in (1, 2):
        save(pod, step)
    newest = read_manifest(run.uri)
    assert newest is not None
    older = registry.blob(newest.annotations[checkpoints.PREVIOUS].rpartition("sha256:")[2])
    if harm == "lost":
        older.unlink()
    else:
        older.write_bytes(older.read_bytes().replace(b"uid-1", b"uid-?") if harm == "changed" else b"?")
    pod = run.pod()
    assert loaded(pod) == 2
    save(pod, 3)
    assert loaded(run.pod()) == 3
    run.pod().discard()
    assert read_manifest(run.uri) is None


@pytest.mark.parametrize("harm", ["changed", "lost"])
def test_answers_that_the_store_damaged_are_left_and_replaced(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    run = Run(f"oci://{registry.host}/{REPOSITORY}:slmops-answers", tmp_path, uid="")
    store = answers.Answers(tmp_path / "store")
    store.add("key", teacher.Reply("text", "stop", 1))
    store.share(run.pod())
    pod = run.pod()
    folder = pod.load()
    assert folder is not None
    blob = registry.blob(hash_of(folder / answers.SHARED))
    if harm == "changed":
        blob.write_bytes(b"?" * blob.stat().st_size)
    else:
        blob.unlink()
    later = answers.Answers(tmp_path / "later")
    later.recall(run.pod())
    assert later.get("key") is None
    later.add("key", teacher.Reply("again", "stop", 1))
    later.share(run.pod())
    last = answers.Answers(tmp_path / "last")
    last.recall(run.pod())
    assert last.get("key") == teacher.Reply("again", "stop", 1)
    registry.stop()
    with pytest.raises(RunFailure) as caught:
        last.recall(run.pod())
    assert caught.value.reason == "StoreUnavailable"


def test_a_pod_killed_before_it_tidied_up(run: Run, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    class PowerCut(BaseException):
        """Nothing gets to run after it."""

    def cut(*_: object, **__: object) -> bool:
        raise PowerCut

    pod = run.pod()
    pod.load()
    for step in (1, 2):
        save(pod, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "delete", cut)
        with pytest.raises(PowerCut):
            save(pod, 3)
    assert kept(registry) == 3
    pod = run.pod()
    assert loaded(pod) == 3
    save(pod, 4)
    assert kept(registry) == 2


def test_when_the_result_is_safe_nothing_stays(run: Run, registry: Registry, tmp_path: Path) -> None:
    result, _ = push(
        write(tmp_path / "out", {"model.safetensors": safetensors()}),
        f"oci://{registry.host}/{REPOSITORY}:v1",
        Manifest(kind="model"),
    )
    pod = run.pod()
    pod.load()
    for step in (1, 2, 3):
        save(pod, step)
    run.pod().discard()
    assert read_manifest(run.uri) is None
    assert kept(registry) == 1
    assert read_manifest(result) is not None
    run.pod().discard()  # there is nothing any more


def test_the_checkpoint_of_another_run_is_neither_used_nor_removed(run: Run, tmp_path: Path) -> None:
    pod = run.pod()
    pod.load()
    save(pod, 1)
    other = Run(run.uri, tmp_path, uid="uid-2")
    assert loaded(other.pod()) is None
    other.pod().discard()
    assert loaded(run.pod()) == 1


def test_a_full_store_keeps_what_it_has_and_takes_more_when_there_is_room(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    server = Registry(tmp_path / "full", storage=small_disk)
    server.start()
    try:
        monkeypatch.setenv("SLMOPS_PLAIN_HTTP", server.host)
        run = Run(f"oci://{server.host}/{REPOSITORY}:ckpt-1", tmp_path)
        pod = run.pod()
        pod.load()
        save(pod, 1)
        (small_disk / "other").write_bytes(bytes(3 << 20))
        write(pod.folder, {"training/weights.safetensors": safetensors(2 << 20, b"2")})
        with pytest.raises(RunFailure) as caught:
            pod.save(patience=1)
        assert caught.value.reason == "DiskFull"
        assert caught.value.retryable
        assert server.host in caught.value.message
        assert loaded(run.pod()) == 1
        (small_disk / "other").unlink()
        pod.save()
        assert loaded(run.pod()) == 2
    finally:
        server.stop()


@pytest.mark.parametrize("code", [400, 409, 412, 413])
def test_a_registry_that_lets_no_tag_be_replaced_fails_no_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """And keeps what it has: the first checkpoint."""
    send = transfer.Http.send

    def picky(http: transfer.Http, method: str, url: str, headers: Any, body: Any = None) -> httpx.Response:
        if method == "PUT" and "/manifests/" in url and read_manifest(run.uri) is not None:
            text = '{"errors":[{"code":"PRECONDITION","message":"the tag is immutable"}]}'
            return httpx.Response(code, text=text, request=httpx.Request(method, url))
        return send(http, method, url, headers, body)

    monkeypatch.setattr(transfer.Http, "send", picky)
    pod = run.pod()
    pod.load()
    save(pod, 1)
    write(pod.folder, {"training/weights.safetensors": safetensors(64, b"2")})
    for _ in range(2):
        assert f"HTTP {code}" in pod.save(patience=5)
    assert len(caplog.records) == 1
    assert loaded(run.pod()) == 1
    monkeypatch.setattr(transfer.Http, "send", send)
    assert pod.save(patience=5) == ""  # somebody has allowed it
    assert loaded(run.pod()) == 2


def test_a_registry_without_the_repository_fails_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that makes none by itself says it: the result could not be published there either."""
    send = transfer.Http.send

    def lacking(http: transfer.Http, method: str, url: str, headers: Any, body: Any = None) -> httpx.Response:
        if method == "POST":
            text = '{"errors":[{"code":"NAME_UNKNOWN"}]}'
            return httpx.Response(404, text=text, request=httpx.Request(method, url))
        return send(http, method, url, headers, body)

    monkeypatch.setattr(transfer.Http, "send", lacking)
    pod = run.pod()
    pod.load()
    with pytest.raises(RunFailure, match="Create it there first") as caught:
        save(pod, 1)
    assert caught.value.reason == "StoreUnavailable"
    monkeypatch.setattr(transfer.Http, "send", send)
    assert pod.save(patience=5) == ""  # somebody has created it
    assert loaded(run.pod()) == 1


def test_a_store_that_is_away_is_no_store_without_a_checkpoint(run: Run, registry: Registry) -> None:
    pod = run.pod()
    pod.load()
    save(pod, 1)
    registry.stop()
    with pytest.raises(RunFailure) as caught:
        run.pod().load()
    assert caught.value.reason == "StoreUnavailable"
    run.pod().discard()  # a result that is safe is not lost over this


def test_on_a_volume_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_PVC_ROOT", str(tmp_path))
    (tmp_path / "claim").mkdir()
    run = Run("pvc://claim/out-ckpt-1", tmp_path)
    pod = run.pod()
    pod.load()
    for step in (1, 2):
        save(pod, step)
    assert [item.name for item in (tmp_path / "claim").iterdir()] == ["out-ckpt-1"]
    pod = run.pod()
    assert loaded(pod) == 2
    save(pod, 3)
    assert loaded(run.pod()) == 3
    pod.discard()
    assert list((tmp_path / "claim").iterdir()) == []


@pytest.mark.parametrize("harm", ["one file", "all files", "also the manifest", "half the manifest"])
def test_on_a_volume_a_damaged_checkpoint_is_removed_and_the_run_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    run = Run(f"file://{tmp_path}/ckpt", tmp_path)
    pod = run.pod()
    assert pod.load() is None
    save(pod, 1)
    files = [path for path in (tmp_path / "ckpt").rglob("*") if path.is_file() and path.name != "slmops-manifest.json"]
    manifest = tmp_path / "ckpt/slmops-manifest.json"
    for path in {"one file": files[:1], "half the manifest": []}.get(harm, files):
        path.unlink()
    if harm == "also the manifest":
        manifest.unlink()
    if harm == "half the manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    pod = run.pod()
    assert pod.load() is None
    assert f"Removed a damaged checkpoint: file://{tmp_path}/ckpt" in caplog.text
    save(pod, 2)
    assert loaded(run.pod()) == 2
    assert sorted(item.name for item in tmp_path.iterdir() if item.is_dir() and "pod" not in item.name) == ["ckpt"]


def test_a_volume_that_is_unwell_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    run = Run(f"file://{tmp_path}/ckpt", tmp_path)
    pod = run.pod()
    pod.load()
    save(pod, 1)
    for part in ("ckpt", "ckpt/slmops-manifest.json", "ckpt/training"):
        with failing(tmp_path / part, errno.EIO), pytest.raises(RunFailure) as caught:
            run.pod().load()
        assert caught.value.reason == "StoreUnavailable"
    assert loaded(run.pod()) == 1


def test_on_a_volume_the_files_of_others_stay(tmp_path: Path) -> None:
    write(tmp_path / "mine", {"notes.txt": b"mine"})
    run = Run(f"file://{tmp_path}/mine", tmp_path)
    pod = run.pod()
    assert pod.load() is None
    write(pod.folder, {"training/same.json": b"{}"})
    assert "notes.txt', which is not" in pod.save()
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_on_a_volume_what_others_put_into_a_checkpoint_stays(tmp_path: Path) -> None:
    run = Run(f"file://{tmp_path}/ckpt", tmp_path)
    pod = run.pod()
    pod.load()
    save(pod, 1)
    (tmp_path / "ckpt/training/same.json").unlink()
    write(tmp_path / "ckpt", {"notes.txt": b"mine"})
    assert run.pod().load() is None
    pod.discard()
    assert contents(tmp_path / "ckpt")["notes.txt"] == b"mine"


def hash_of(path: Path) -> str:
    """The name under which the registry keeps the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
