"""Against a real registry: what is pushed comes back whole, once, and under one digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from artifact_support import Registry, contents, growing, run_cli, safetensors, wait_for, write

from slmops_artifacts import ArtifactError, Manifest, Parent, pull, push, read_manifest, resolve, transfer, upload
from slmops_artifacts.files import Entry, Ticker
from slmops_artifacts.registry_auth import RegistryAuth

FULL = Manifest(
    kind="model",
    format="safetensors",
    parents=(Parent(kind="model", uri="hf://a/b@main", digest="sha256:" + "a" * 64, name="DistillationJob/x"),),
    dataset_digest="sha256:" + "b" * 64,
    recipe={"lr": 1e-4, "nested": {"β": [1, None]}},
    seed=7,
    versions={"torch": "2.9"},
    metrics={"loss": 0.25, "exact": 1.0, "broken": float("inf")},
    annotations={"name": "tiny"},
    created="2026-01-01T00:00:00Z",
)


def test_what_is_pushed_comes_back(registry: Registry, model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    uri, pushed = push(model, f"oci://{registry.host}/team/tiny:v1", FULL, progress=lambda a, b: seen.append((a, b)))
    assert uri == f"oci://{registry.host}/team/tiny:v1@{pushed.digest}"
    assert pushed.size_bytes == sum(len(data) for data in contents(model).values())
    assert seen[-1] == (pushed.size_bytes, pushed.size_bytes)
    assert resolve(f"oci://{registry.host}/team/tiny:v1") == pushed.digest
    assert read_manifest(uri) == pushed
    for number, source in enumerate((uri, f"oci://{registry.host}/team/tiny:v1")):
        dest = tmp_path / f"out{number}"
        assert pull(source, dest) == pushed
        assert contents(dest) == contents(model)
        assert (dest / ".slmops-complete").is_file()
    assert pushed.lineage == FULL.parents
    assert pushed.model_copy(update={"digest": "", "size_bytes": 0, "lineage": ()}) == FULL


def test_the_layout_is_modelpack(registry: Registry, model: Path) -> None:
    uri, pushed = push(model, f"oci://{registry.host}/tiny", Manifest(kind="model", created="2026-01-01T00:00:00Z"))
    reply = httpx.get(
        f"http://{registry.host}/v2/tiny/manifests/latest",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
    )
    document = reply.json()
    assert reply.headers["docker-content-digest"] == pushed.digest
    assert uri.endswith(pushed.digest)
    assert document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert [(layer["annotations"]["org.cncf.model.filepath"], layer["mediaType"]) for layer in document["layers"]] == [
        ("config.json", "application/vnd.cncf.model.weight.config.v1.raw"),
        ("model.safetensors", "application/vnd.cncf.model.weight.v1.raw"),
        ("sub/tokenizer.json", "application/vnd.cncf.model.weight.config.v1.raw"),
    ]
    config = json.loads(registry.blob(document["config"]["digest"][7:]).read_bytes())
    assert set(config) == {"descriptor", "config", "modelfs"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in document["layers"]]}


def test_the_same_push_twice_is_one_digest_and_sends_nothing(registry: Registry, model: Path, tmp_path: Path) -> None:
    first = push(model, f"oci://{registry.host}/tiny:v1", FULL)
    copy = write(tmp_path / "copy", contents(model))
    time.sleep(0.01)
    before = registry.log().count("http.request.method=POST")
    second = push(copy, f"oci://{registry.host}/tiny:v2", FULL)
    assert first[1].digest == second[1].digest
    assert registry.log().count("http.request.method=POST") == before
    assert (
        push(copy, f"oci://{registry.host}/tiny:v2", FULL.model_copy(update={"seed": 8}))[1].digest != first[1].digest
    )


def test_odd_names_empty_files_and_equal_files(registry: Registry, tmp_path: Path) -> None:
    files = {
        "model.safetensors": safetensors(),
        "ünï cødé/日本 (1).json": b"{}",
        "empty.txt": b"",
        "other-empty.txt": b"",
        "a%2Fb&c=d#e?f.json": b"1",
        "back\\slash.json": b"2",
        "twin.json": b"{}",
        "LICENSE": b"free",
    }
    source = write(tmp_path / "odd", files)
    uri, _ = push(source, f"oci://{registry.host}/odd:v1", Manifest(kind="model"))
    pull(uri, tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_large_files_go_in_chunks(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "CHUNK_SIZE", 1 << 20)
    source = write(tmp_path / "big", {"model.safetensors": safetensors(5 << 20, bytes(range(256)))})
    uri, _ = push(source, f"oci://{registry.host}/big:v1", Manifest(kind="model"))
    assert registry.log().count("http.request.method=PATCH") >= 5
    pull(uri, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_a_hiccup_in_a_slow_upload_costs_no_chunk_that_came_through(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk takes longer than the patience: the link is slow, but everything works."""
    now, sent, faults = 0.0, list[str](), [3, 4]
    send = transfer.Http.send

    def slow(http: transfer.Http, method: str, url: str, headers: Any, body: Any = None) -> httpx.Response:
        nonlocal now
        if method == "PATCH":
            now += 20.0
            sent.append(headers["Content-Range"])
            if len(sent) in faults:
                return httpx.Response(502, request=httpx.Request(method, url))
        return send(http, method, url, headers, body)

    source = write(tmp_path / "big", {"model.safetensors": safetensors(5 << 20, bytes(range(256)))})
    with monkeypatch.context() as patch:
        patch.setattr(upload, "CHUNK_SIZE", 1 << 20)
        patch.setattr(transfer.Http, "send", slow)
        patch.setattr(transfer.time, "monotonic", lambda: now)
        patch.setattr(transfer.time, "sleep", lambda _: None)
        with pytest.raises(ArtifactError, match="HTTP 502"):  # the second one in a row is 20 s after the first
            push(source, f"oci://{registry.host}/big:v1", Manifest(kind="model"), patience=15)
        faults.pop()
        sent.clear()
        uri, _ = push(source, f"oci://{registry.host}/big:v1", Manifest(kind="model"), patience=15)
    chunks = [f"{start << 20}-{((start + 1) << 20) - 1}" for start in range(5)]
    assert sent == [*chunks[:3], *chunks[2:]]
    pull(uri, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_a_part_of_a_chunk_that_came_through_is_something_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a link that fails more often than a chunk takes, the upload still comes to its end."""
    now, at, size = 0.0, 0, 3000
    digest = "a" * 64

    def registry(request: httpx.Request) -> httpx.Response:
        nonlocal now, at
        location = {"Location": "/v2/a/blobs/uploads/1"}
        if request.method == "POST":
            return httpx.Response(202, headers=location)
        if request.method == "GET":
            return httpx.Response(204, headers={**location, "Range": f"0-{at - 1}"})
        now += 20.0
        at = min(size, at + 700)  # so many bytes come through before the link breaks
        return httpx.Response(201 if at == size else 502)

    http = transfer.Http(
        "registry", RegistryAuth(httpx.URL("https://registry/v2/a/"), "registry", "a", "push", None), 15
    )
    http.client = httpx.Client(transport=httpx.MockTransport(registry))
    monkeypatch.setattr(transfer.time, "monotonic", lambda: now)
    monkeypatch.setattr(transfer.time, "sleep", lambda _: None)
    base = httpx.URL("https://registry/v2/a/")
    upload.upload(
        http, base, Entry("w", size, digest), lambda start, end: iter([bytes(end - start)]), Ticker(size, None)
    )
    assert (at, now) == (size, 100.0)


def test_of_an_artifact_only_what_is_chosen_is_fetched(registry: Registry, model: Path, tmp_path: Path) -> None:
    uri, pushed = push(model, f"oci://{registry.host}/tiny:v1", FULL)
    registry.blob(hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()).rename(tmp_path / "away")
    dest = tmp_path / "out"
    for name in ("config.json", "sub/tokenizer.json", "config.json"):
        assert pull(uri, dest, choose=lambda paths, name=name: [path for path in paths if path == name]) == pushed
        assert contents(dest) == {name: (model / name).read_bytes()}
    with pytest.raises(ArtifactError):  # a part is not taken for the whole
        pull(uri, dest)


def test_absent_means_none_and_pull_says_so(registry: Registry, tmp_path: Path) -> None:
    uri = f"oci://{registry.host}/nothing:v1"
    assert resolve(uri) is None
    assert read_manifest(uri) is None
    with pytest.raises(ArtifactError) as caught:
        pull(uri, tmp_path / "out")
    assert caught.value.reason == "SourceNotFound"
    assert uri in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_damaged_blob_is_refused_and_named(registry: Registry, model: Path, tmp_path: Path) -> None:
    uri, _ = push(model, f"oci://{registry.host}/tiny:v1", FULL)
    blob = registry.blob(hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest())
    good = blob.read_bytes()
    for bad in (good[:-1] + b"x", good[:-5], good + b"more", b""):
        blob.write_bytes(bad)
        with pytest.raises(ArtifactError) as caught:
            pull(uri, tmp_path / "out")
        assert caught.value.reason == "DigestMismatch", bad
        assert "model.safetensors" in caught.value.message
        assert not (tmp_path / "out").exists()
    blob.write_bytes(good)
    pull(uri, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


def test_credentials(closed_registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"oci://{closed_registry.host}/team/tiny:v1"
    with pytest.raises(ArtifactError) as caught:
        push(model, uri, FULL)
    assert caught.value.reason == "AccessDenied"
    assert not caught.value.retryable
    with pytest.raises(ArtifactError) as caught:
        push(model, uri, FULL, secret={"username": "ann", "password": "wr0ng"})
    assert caught.value.reason == "AccessDenied"
    assert "wr0ng" not in str(caught.value)
    config = tmp_path / "docker.json"
    auths = {"127.0.0.1:*": {"auth": "bm9ib2R5Om5vYm9keQ=="}, closed_registry.host: {"auth": "YW5uOnMzY3JldA=="}}
    config.write_text(json.dumps({"auths": auths}))
    monkeypatch.setenv("SLMOPS_REGISTRY_AUTH", str(config))
    pinned, _ = push(model, uri, FULL)
    monkeypatch.delenv("SLMOPS_REGISTRY_AUTH")
    pull(pinned, tmp_path / "a", secret={"username": b"ann", "password": b"s3cret\n"})
    pull(pinned, tmp_path / "b", secret={".dockerconfigjson": config.read_text()})
    config.write_text("no json")
    with pytest.raises(ArtifactError, match="not a Docker config"):
        resolve(pinned, secret={".dockerconfigjson": config.read_text()})


def test_a_registry_that_is_down_is_retryable_and_its_return_is_noticed(
    registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"oci://{registry.host}/tiny:v1"
    registry.stop()
    with pytest.raises(ArtifactError) as caught:
        push(model, uri, FULL)
    assert caught.value.reason == "SourceUnavailable"
    assert caught.value.retryable
    monkeypatch.setenv("SLMOPS_RETRY_SECONDS", "20")
    back = threading.Timer(1.5, registry.start)
    back.start()
    _, pushed = push(model, uri, FULL)
    back.join()
    assert resolve(uri) == pushed.digest


def test_what_is_there_already_needs_no_registry(registry: Registry, model: Path, tmp_path: Path) -> None:
    """A pod starts again, its model whole in its volume."""
    uri, _ = push(model, f"oci://{registry.host}/tiny:v1", FULL)
    pulled = pull(uri, tmp_path / "out")
    registry.stop()
    seen: list[tuple[int, int]] = []
    assert pull(uri, tmp_path / "out", patience=0, progress=lambda done, total: seen.append((done, total))) == pulled
    assert seen == [(pulled.size_bytes, pulled.size_bytes)]
    for other in (f"oci://{registry.host}/tiny:v1", f"oci://{registry.host}/tiny@sha256:{'0' * 64}"):
        with pytest.raises(ArtifactError, match="cannot be reached"):
            pull(other, tmp_path / "out", patience=0)
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(ArtifactError, match="cannot be reached"):
        pull(uri, tmp_path / "out", patience=0)


def test_a_registry_that_dies_in_mid_push_and_mid_pull(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "CHUNK_SIZE", 2 << 20)
    monkeypatch.setenv("SLMOPS_RETRY_SECONDS", "20")
    source = write(tmp_path / "big", {"model.safetensors": safetensors(16 << 20, bytes(range(251)))})

    def bounce_at(mark: int) -> Callable[[int, int], None]:
        fired: list[int] = []

        def progress(done: int, _: int) -> None:
            if done >= mark and not fired:
                fired.append(done)
                registry.stop()
                threading.Timer(0.5, registry.start).start()

        return progress

    uri, pushed = push(source, f"oci://{registry.host}/big:v1", FULL, progress=bounce_at(7 << 20))
    assert pull(uri, tmp_path / "out", progress=bounce_at(9 << 20)) == pushed
    assert contents(tmp_path / "out") == contents(source)
    assert registry.log().count("http.response.status=206") == 1, "the download went on where it was cut"


@pytest.mark.parametrize("mount", [False, True], ids=["new folder", "existing folder"])
def test_kill_in_mid_push_and_mid_pull_then_again(registry: Registry, tmp_path: Path, mount: bool) -> None:
    names = [f"model-{number}.safetensors" for number in range(8)]
    files = {name: safetensors(12 << 20, name.encode()) for name in names}
    source = write(tmp_path / "big", files)
    uri = f"oci://{registry.host}/big:v1"
    pusher = run_cli("push", str(source), uri)
    wait_for(lambda: len(growing(registry.storage, "sha256/*/*/data")) >= 3)
    pusher.send_signal(signal.SIGKILL)
    pusher.communicate()
    assert resolve(uri) is None, "nothing may be visible before the end"
    _, pushed = push(source, uri, Manifest(kind="model"))

    dest = tmp_path / "models" / "base"
    if mount:
        dest.mkdir(parents=True)
    puller = run_cli("pull", uri, str(dest))
    wait_for(lambda: len(growing(tmp_path / "models", "model-*.safetensors")) >= 3)
    puller.send_signal(signal.SIGKILL)
    puller.communicate()
    assert not (dest / ".slmops-complete").exists()
    assert mount or not dest.exists()
    before = registry.log().count("http.request.method=GET")
    assert pull(uri, dest) == pushed
    fetched = registry.log().count("http.request.method=GET") - before
    # the manifest, what had not ended, and the one that was cut off, which the registry may write down late
    assert fetched <= 1 + len(names) - 3 + 1, "finished files are kept"
    assert contents(dest) == files
    left = [item.name for item in (tmp_path / "models").iterdir()] + [item.name for item in dest.iterdir()]
    assert [name for name in left if name.startswith(".slmops")] == [".slmops-complete"]


def test_two_pushers_and_two_pullers_at_once(registry: Registry, tmp_path: Path) -> None:
    files = {"model.safetensors": safetensors(8 << 20, b"ab"), "config.json": b"{}"}
    source = write(tmp_path / "src", files)
    uri = f"oci://{registry.host}/two:v1"
    pushers = [run_cli("push", str(source), uri) for _ in range(3)]
    printed = {process.communicate()[0] for process in pushers}
    assert [process.returncode for process in pushers] == [0, 0, 0]
    assert len(printed) == 1
    pullers = [run_cli("pull", uri, str(tmp_path / "out")) for _ in range(3)]
    results = [process.communicate() for process in pullers]
    assert [process.returncode for process in pullers] == [0, 0, 0], results
    assert contents(tmp_path / "out") == files


def test_a_full_disk_is_known_before_the_first_byte(registry: Registry, tmp_path: Path, small_disk: Path) -> None:
    source = write(tmp_path / "big", {"model.safetensors": safetensors(6 << 20)})
    uri, _ = push(source, f"oci://{registry.host}/big:v1", Manifest(kind="model"))
    for dest in (small_disk / "model", small_disk):
        with pytest.raises(ArtifactError) as caught:
            pull(uri, dest)
        assert caught.value.reason == "DiskFull"
        assert "MiB" in caught.value.message
        assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_on_the_way(
    registry: Registry, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "big", {"model.safetensors": safetensors(3 << 20)})
    uri, _ = push(source, f"oci://{registry.host}/big:v1", Manifest(kind="model"))

    def fill(done: int, _: int) -> None:
        if done and not (small_disk / "other").exists():
            with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(65536))

    with pytest.raises(ArtifactError) as caught:
        pull(uri, small_disk / "model", progress=fill)
    assert caught.value.reason == "DiskFull"
    (small_disk / "other").unlink()
    pull(uri, small_disk / "model")


def test_a_registry_with_a_full_disk_is_named(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    server = Registry(tmp_path / "full", storage=small_disk)
    server.start()
    try:
        monkeypatch.setenv("SLMOPS_PLAIN_HTTP", server.host)
        source = write(tmp_path / "big", {"model.safetensors": safetensors(8 << 20)})
        with pytest.raises(ArtifactError) as caught:
            push(source, f"oci://{server.host}/big:v1", Manifest(kind="model"))
        assert caught.value.reason == "DiskFull"
        assert server.host in caught.value.message
    finally:
        server.stop()


def test_plain_http_must_be_asked_for(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLMOPS_PLAIN_HTTP")
    with pytest.raises(ArtifactError, match="SLMOPS_PLAIN_HTTP") as caught:
        resolve(f"oci://{registry.host}/tiny:v1")
    assert not caught.value.retryable


def test_the_destination_is_replaced_only_when_it_is_ours(registry: Registry, model: Path, tmp_path: Path) -> None:
    one, first = push(model, f"oci://{registry.host}/tiny:v1", FULL)
    (model / "config.json").unlink()
    (model / "new.json").write_bytes(b"[]")
    two, second = push(model, f"oci://{registry.host}/tiny:v2", FULL)
    dest = tmp_path / "dest"
    pull(one, dest)
    assert pull(one, dest) == first
    assert pull(two, dest) == second
    assert set(contents(dest)) == {"model.safetensors", "new.json", "sub/tokenizer.json"}
    foreign = write(tmp_path / "foreign", {"notes.txt": b"mine"})
    with pytest.raises(ArtifactError, match="already holds files"):
        pull(one, foreign)
    assert contents(foreign) == {"notes.txt": b"mine"}


def test_a_pulled_folder_can_be_pushed_again(registry: Registry, model: Path, tmp_path: Path) -> None:
    uri, pushed = push(model, f"oci://{registry.host}/tiny:v1", FULL)
    pull(uri, tmp_path / "out")
    assert push(tmp_path / "out", f"oci://{registry.host}/tiny:again", FULL)[1].digest == pushed.digest


def test_umount_leftovers_do_not_disturb() -> None:
    """The fixture of the small disk cleans up behind itself."""
    mounts = subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout
    assert "slmops-test" not in mounts


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_other_tools_can_mirror_an_artifact(registry: Registry, model: Path, tmp_path: Path) -> None:
    _, pushed = push(model, f"oci://{registry.host}/tiny:v1", FULL)
    ends = [f"docker://{registry.host}/{name}:v1" for name in ("tiny", "mirror")]
    flags = ["--src-tls-verify=false", "--dest-tls-verify=false"]
    subprocess.run(["skopeo", "copy", *flags, *ends], check=True, capture_output=True)
    assert pull(f"oci://{registry.host}/mirror:v1", tmp_path / "out") == pushed
