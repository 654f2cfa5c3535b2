"""pvc:// and file://: folders that appear whole, and nothing outside the claim."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifact_support import contents, failing, growing, run_cli, safetensors, wait_for, write

from slmops_artifacts import ArtifactError, Manifest, delete, pull, push, read_manifest, resolve, staging
from slmops_artifacts.folder import check_target, discard_damaged, published
from slmops_artifacts.uris import FolderRef, parse

PLAIN = Manifest(kind="model")


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLMOPS_PVC_ROOT", str(tmp_path / "pvc"))
    folder = tmp_path / "pvc" / "store"
    folder.mkdir(parents=True)
    return folder


def test_what_is_pushed_comes_back(claim: Path, model: Path, tmp_path: Path) -> None:
    assert resolve("pvc://store/models/tiny") is None
    uri, pushed = push(model, "pvc://store/models/tiny", PLAIN)
    assert uri == "pvc://store/models/tiny"
    assert pushed.format == "safetensors"
    assert read_manifest(uri) == pushed
    assert resolve(uri) == pushed.digest
    assert pull(uri, tmp_path / "out") == pushed
    assert pull(f"{uri}@{pushed.digest}", tmp_path / "out2") == pushed
    assert contents(tmp_path / "out") == contents(model)
    assert (claim / "models/tiny/slmops-manifest.json").is_file()
    assert [item.name for item in (claim / "models").iterdir()] == ["tiny"]


def test_the_same_content_has_the_same_digest_whatever_the_manifest(claim: Path, model: Path) -> None:
    first = push(model, "pvc://store/a", PLAIN)[1]
    second = push(model, "pvc://store/b", PLAIN.model_copy(update={"created": "2026-01-01T00:00:00Z"}))[1]
    assert first.digest == second.digest
    (model / "config.json").rename(model / "config2.json")
    assert push(model, "pvc://store/c", PLAIN)[1].digest != first.digest


def test_a_new_push_replaces_the_old_one_whole(claim: Path, model: Path) -> None:
    push(model, "pvc://store/a", PLAIN)
    (model / "config.json").unlink()
    _, pushed = push(model, "pvc://store/a", PLAIN)
    assert set(contents(claim / "a")) == {"model.safetensors", "sub/tokenizer.json"}
    assert resolve("pvc://store/a") == pushed.digest
    assert [item.name for item in claim.iterdir()] == ["a"]


def test_files_of_others_are_not_replaced(claim: Path, model: Path) -> None:
    write(claim / "mine", {"thesis.txt": b"years of work"})
    with pytest.raises(ArtifactError, match=r"pvc://store/mine holds 'thesis\.txt', which") as caught:
        push(model, "pvc://store/mine", PLAIN)
    assert caught.value.reason == "Refused"
    with pytest.raises(ArtifactError, match="whole volume"):
        push(model, "pvc://store", PLAIN)
    assert (claim / "mine/thesis.txt").read_bytes() == b"years of work"


@pytest.mark.parametrize("name", ["notes.txt", "sub/deep/run.log", "int4/slmops-manifest.json"])
def test_nothing_beside_an_artifact_goes_with_it(claim: Path, model: Path, tmp_path: Path, name: str) -> None:
    uri, first = push(model, "pvc://store/a", PLAIN)
    write(claim / "a", {name: b"mine"})
    before = contents(claim / "a")
    (model / "config.json").write_bytes(b"[]")
    with pytest.raises(ArtifactError, match=re.escape(name)) as caught:
        push(model, uri, PLAIN)
    assert caught.value.reason == "Refused"
    with pytest.raises(ArtifactError, match=re.escape(name)):
        delete(uri)
    assert contents(claim / "a") == before
    assert pull(uri, tmp_path / "out") == first  # and does not become a part of it
    assert name not in contents(tmp_path / "out")


@pytest.mark.parametrize("harm", ["changed", "changed to the same size", "lost", "a link"])
def test_what_is_left_of_an_artifact_is_replaced(claim: Path, model: Path, tmp_path: Path, harm: str) -> None:
    uri, _ = push(model, "pvc://store/a", PLAIN)
    (claim / "a/config.json").unlink()
    if harm == "changed":
        write(claim / "a", {"config.json": b'{"changed": true}'})
    if harm == "changed to the same size":
        write(claim / "a", {"config.json": b"[]"})
    if harm == "a link":
        (claim / "a/more.json").symlink_to("sub/tokenizer.json")
        with pytest.raises(ArtifactError, match=r"more\.json"):
            push(model, uri, PLAIN)
        (claim / "a/more.json").unlink()
    _, pushed = push(model, uri, PLAIN)
    assert pull(uri, tmp_path / "out") == pushed
    assert contents(claim / "a") == contents(model)


def test_the_manifest_is_that_of_the_last_push_also_of_equal_files(claim: Path, model: Path) -> None:
    push(model, "pvc://store/a", PLAIN)
    uri, pushed = push(model, "pvc://store/a", PLAIN.model_copy(update={"annotations": {"run": "2"}}))
    assert read_manifest(uri) == pushed
    assert contents(claim / "a") == contents(model)
    assert [item.name for item in claim.iterdir()] == ["a"]


@pytest.mark.parametrize(("number", "reason"), [(errno.EACCES, "AccessDenied"), (errno.EIO, "SourceUnavailable")])
def test_what_cannot_be_looked_at_is_said_and_is_not_taken_for_absent(
    claim: Path, model: Path, tmp_path: Path, number: int, reason: str
) -> None:
    uri, pushed = push(model, "pvc://store/team/a", PLAIN)
    ref = parse(uri)
    assert isinstance(ref, FolderRef)
    actions: list[Callable[[], object]] = [
        lambda: push(model, uri, PLAIN),
        lambda: pull(uri, tmp_path / "out"),
        lambda: read_manifest(uri),
        lambda: delete(uri),
        lambda: published(ref),
        lambda: check_target(ref),
        lambda: discard_damaged(ref),
    ]
    for part, some in (("team", actions), ("team/a/slmops-manifest.json", actions)):
        for action in some:
            with failing(claim / part, number), pytest.raises(ArtifactError, match="store/team") as caught:
                action()
            assert caught.value.reason == reason
    assert read_manifest(uri) == pushed
    write(claim / "team/a", {"logs/run.log": b"mine"})
    with failing(claim / "team/a/logs", number), pytest.raises(ArtifactError, match="store/team") as caught:
        delete(uri)
    assert caught.value.reason == reason
    (claim / "team/a/config.json").unlink()
    with failing(claim / "team/a/logs", number), pytest.raises(ArtifactError, match="store/team") as caught:
        discard_damaged(ref)
    assert caught.value.reason == reason


def test_no_artifact_lies_in_another(claim: Path, model: Path) -> None:
    push(model, "pvc://store/a", PLAIN)
    before = contents(claim)
    for uri in ("pvc://store/a/int4", "pvc://store/a/sub/deep/er"):
        with pytest.raises(ArtifactError, match=f"{uri} lies in .* artifact, pvc://store/a,") as caught:
            push(model, uri, PLAIN)
        assert caught.value.reason == "Refused"
    assert contents(claim) == before
    push(model, "pvc://store/b/int4", PLAIN)
    with pytest.raises(ArtifactError, match=r"int4/"):
        push(model, "pvc://store/b", PLAIN)
    assert read_manifest("pvc://store/b/int4") is not None


def test_folders_filled_by_hand_and_single_files(claim: Path, model: Path, tmp_path: Path) -> None:
    write(claim, {f"byhand/{path}": data for path, data in contents(model).items()})
    write(claim, {"data/train.jsonl": b'{"a":1}\n', "data/.DS_Store": b"x"})
    digest = resolve("pvc://store/byhand")
    assert pull("pvc://store/byhand", tmp_path / "out").digest == digest
    data = pull("pvc://store/data/train.jsonl", tmp_path / "data")
    assert (data.kind, data.format) == ("dataset", "jsonl")
    assert contents(tmp_path / "data") == {"train.jsonl": b'{"a":1}\n'}
    assert pull("pvc://store/data", tmp_path / "data2").digest == data.digest


def test_of_a_folder_only_what_is_chosen_is_copied(claim: Path, model: Path, tmp_path: Path) -> None:
    _, pushed = push(model, "pvc://store/a", PLAIN)
    for dest in (tmp_path / "new", tmp_path / "there"):
        if dest.name == "there":
            dest.mkdir()
        assert pull("pvc://store/a", dest, choose=lambda _: ["config.json"]) == pushed
        assert set(contents(dest)) == {"config.json"}
        assert pull("pvc://store/a", dest) == pushed
        assert contents(dest) == contents(model)
    file = claim / "a/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError) as caught:
        pull("pvc://store/a", tmp_path / "last", choose=lambda _: ["config.json"])
    assert caught.value.reason == "DigestMismatch"


def test_a_changed_file_is_noticed(claim: Path, model: Path, tmp_path: Path) -> None:
    push(model, "pvc://store/a", PLAIN)
    file = claim / "a/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError) as caught:
        pull("pvc://store/a", tmp_path / "out")
    assert caught.value.reason == "DigestMismatch"
    with pytest.raises(ArtifactError) as caught:
        pull("pvc://store/a@sha256:" + "0" * 64, tmp_path / "out")
    assert caught.value.reason == "DigestMismatch"
    assert not (tmp_path / "out").exists()


def test_an_artifact_that_another_was_published_over_is_not_taken_for_it(
    claim: Path, model: Path, tmp_path: Path
) -> None:
    uri, first = push(model, "pvc://store/a", PLAIN)
    pinned = f"{uri}@{first.digest}"
    pull(pinned, tmp_path / "held")
    (model / "config.json").write_bytes(b"[]")
    _, second = push(model, uri, PLAIN)
    with pytest.raises(ArtifactError, match=f"another artifact .{second.digest[:19]}") as caught:
        pull(pinned, tmp_path / "out")
    assert caught.value.reason == "DigestMismatch"
    assert not (tmp_path / "out").exists()
    assert pull(pinned, tmp_path / "held") == first  # what is there already is what is meant


@pytest.mark.parametrize(
    "uri",
    [
        "pvc://store/../other",
        "pvc://../etc",
        "pvc://store/a/../../../etc",
        "pvc://./x",
        "pvc:///etc",
        "pvc://Store/x",
        "pvc://store/a\0b",
    ],
)
def test_paths_stay_in_the_claim(claim: Path, tmp_path: Path, uri: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        pull(uri, tmp_path / "out")
    assert caught.value.reason == "BadUri"


def test_links_do_not_lead_out_of_the_claim(claim: Path, model: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"secret.json": b"{}"})
    (claim / "link").symlink_to(outside)
    for action in (
        lambda: pull("pvc://store/link", tmp_path / "out"),
        lambda: push(model, "pvc://store/link/x", PLAIN),
    ):
        with pytest.raises(ArtifactError, match="symbolic link") as caught:
            action()
        assert caught.value.reason == "BadUri"
    write(claim / "folder", {"config.json": b"{}"})
    (claim / "folder/more.json").symlink_to(outside / "secret.json")
    with pytest.raises(ArtifactError, match="symbolic link"):
        pull("pvc://store/folder", tmp_path / "out")
    (model / "extra.json").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="symbolic link"):
        push(model, "pvc://store/new", PLAIN)


def test_a_claim_that_is_not_mounted(claim: Path, model: Path, tmp_path: Path) -> None:
    for action in (lambda: pull("pvc://absent/x", tmp_path / "o"), lambda: push(model, "pvc://absent/x", PLAIN)):
        with pytest.raises(ArtifactError, match="not mounted") as caught:
            action()
        assert caught.value.reason == "SourceNotFound"


def test_kill_in_mid_push_then_again(claim: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "big", {f"m{n}.safetensors": safetensors(12 << 20, b"%d" % n) for n in range(8)})
    pusher = run_cli("push", str(source), "pvc://store/deep/big")
    wait_for(lambda: len(growing(claim, "m*.safetensors")) >= 2)
    pusher.send_signal(signal.SIGKILL)
    pusher.communicate()
    assert resolve("pvc://store/deep/big") is None
    (source / "m0.safetensors").unlink()  # another content: what the killed one left must go
    push(source, "pvc://store/deep/big", PLAIN)
    assert contents(claim / "deep/big") == contents(source)
    assert [item.name for item in (claim / "deep").iterdir()] == ["big"]


def test_two_pushers_at_once_leave_one_whole_artifact(claim: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.safetensors": safetensors(4 << 20, b"1"), "one.json": b"1"})
    two = write(tmp_path / "two", {"a.safetensors": safetensors(4 << 20, b"2"), "two.json": b"2"})
    for _ in range(5):
        processes = [run_cli("push", str(source), "pvc://store/x") for source in (one, two, one, two)]
        results = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, results
        assert contents(claim / "x") in (contents(one), contents(two))
        assert resolve("pvc://store/x") is not None
    assert [item.name for item in claim.iterdir()] == ["x"]


def test_a_folder_exchanged_while_it_is_read_is_read_again(
    claim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        push(write(tmp_path / name, {"a.safetensors": safetensors(8, name[:1].encode())}), f"pvc://store/{name}", PLAIN)
    wanted = staging.installed(claim / "new")
    read = staging._read_installed

    def torn(folder: Path) -> staging.Installed | None:
        """The marker of one and the files of the other: nothing whole, once."""
        monkeypatch.setattr(staging, "_read_installed", read)
        (claim / "old").rename(claim / "gone")
        (claim / "new").rename(claim / "old")
        return None

    monkeypatch.setattr(staging, "_read_installed", torn)
    assert wanted is not None
    assert staging.installed(claim / "old") == wanted


def test_readers_see_old_or_new_but_never_a_mixture(claim: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.safetensors": safetensors(1 << 20, b"1"), "one.json": b"1"})
    two = write(tmp_path / "two", {"a.safetensors": safetensors(1 << 20, b"2"), "two.json": b"2"})
    push(one, "pvc://store/x", PLAIN)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            push(two, "pvc://store/x", PLAIN)
            stop.wait(0.05)
            push(one, "pvc://store/x", PLAIN)
            stop.wait(0.05)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(20):
            pull("pvc://store/x", tmp_path / f"out{number}")
            assert contents(tmp_path / f"out{number}") in (contents(one), contents(two))
    finally:
        stop.set()
        thread.join()


def test_file_systems_that_cannot_swap(claim: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_RENAME_EXCHANGE", 1 << 20)
    push(model, "pvc://store/a", PLAIN)
    (model / "config.json").write_bytes(b"[]")
    push(model, "pvc://store/a", PLAIN)
    assert contents(claim / "a") == contents(model)
    assert [item.name for item in claim.iterdir()] == ["a"]


def test_what_another_writer_has_just_published_is_swept_by_nobody(
    claim: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a staging folder and the hand on it, its writer renames it into its place."""
    other = claim / ".slmops-a-0123456789abcdef"
    other.mkdir()
    look = os.open

    def late(path: Any, *more: Any, **named: Any) -> int:
        if Path(path) == other and other.exists():
            other.rename(claim / "b")
        return look(path, *more, **named)

    monkeypatch.setattr(os, "open", late)
    push(model, "pvc://store/a", PLAIN)
    assert (claim / "b").is_dir()
    assert contents(claim / "a") == contents(model)


def test_a_staging_folder_that_goes_while_it_is_made_is_made_again(
    claim: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder publishes it between mkdir, which finds it, and the look whether it is a folder."""
    make, refused = os.mkdir, list[Path]()

    def late(path: Any, *more: Any, **named: Any) -> None:
        if Path(path).name.startswith(".slmops-a-") and not refused:
            refused.append(Path(path))
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        make(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", late)
    push(model, "pvc://store/a", PLAIN)
    assert refused
    assert contents(claim / "a") == contents(model)


def test_a_full_volume(model: Path, small_disk: Path) -> None:
    write(model, {"big.safetensors": safetensors(6 << 20)})
    with pytest.raises(ArtifactError) as caught:
        push(model, f"file://{small_disk}/a", PLAIN)
    assert caught.value.reason == "DiskFull"
    assert list(small_disk.iterdir()) == []


def test_file_uris(model: Path, tmp_path: Path) -> None:
    _, pushed = push(model, f"file://{tmp_path}/with%20space", PLAIN)
    assert (tmp_path / "with space").is_dir()
    assert pull(f"file://{tmp_path}/with%20space", tmp_path / "out") == pushed
    assert read_manifest(f"file://{tmp_path}/out") == pushed
