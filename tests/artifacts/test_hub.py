"""hf:// against a local server that speaks the Hub's API; the official client checks that the server is faithful."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from artifact_support import contents, safetensors, write
from hub import Hub

from slmops_artifacts import ArtifactError, Manifest, pull, push, read_manifest, resolve

MODEL = {
    "README.md": b"# tiny",
    ".gitattributes": b"*.bin lfs",
    "config.json": b'{"model_type":"llama"}',
    "model.safetensors": safetensors(3 << 20, bytes(range(256))),
    "consolidated.safetensors": safetensors(16),
    "pytorch_model.bin": b"PK\x03\x04",
    "modeling_tiny.py": b"import os",
    "onnx/model.onnx": b"onnx",
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
}
KEPT = {"README.md", "config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"}


def test_a_model_comes_without_code_and_pickles(hub: Hub, tmp_path: Path) -> None:
    repository = hub.add("org/tiny", MODEL)
    manifest = pull("hf://org/tiny", tmp_path / "out")
    assert contents(tmp_path / "out") == {path: MODEL[path] for path in KEPT}
    assert (manifest.kind, manifest.format) == ("model", "safetensors")
    assert manifest.annotations["dev.slmops.commit"] == repository.commit
    assert resolve("hf://org/tiny") == manifest.digest
    assert read_manifest(f"hf://org/tiny@{repository.commit}") == manifest
    assert not any("pytorch_model" in path or ".py" in path for path in hub.gets())


def test_the_digest_is_that_of_the_same_files_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMOPS_PVC_ROOT", str(tmp_path / "pvc"))
    (tmp_path / "pvc" / "claim").mkdir(parents=True)
    hub.add("org/tiny", MODEL)
    manifest = pull("hf://org/tiny", tmp_path / "out")
    assert push(tmp_path / "out", "pvc://claim/tiny", Manifest(kind="model"))[1].digest == manifest.digest


def test_a_second_pull_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", MODEL)
    first = pull("hf://org/tiny@main", tmp_path / "out")
    before = len(hub.requests)
    assert pull("hf://org/tiny@main", tmp_path / "out") == first
    assert len(hub.requests) == before + 1
    hub.add("org/tiny", {**MODEL, "config.json": b"{}"})
    assert pull("hf://org/tiny@main", tmp_path / "out").digest != first.digest
    assert (tmp_path / "out/config.json").read_bytes() == b"{}"


def test_a_commit_that_is_there_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    uri = f"hf://org/tiny@{hub.add('org/tiny', MODEL).commit}"
    first = pull(uri, tmp_path / "out")
    before = len(hub.requests)
    assert pull(uri, tmp_path / "out") == first
    assert len(hub.requests) == before
    (tmp_path / "out/config.json").unlink()
    assert pull(uri, tmp_path / "out") == first
    assert (tmp_path / "out/config.json").read_bytes() == MODEL["config.json"]


def test_datasets(hub: Hub, tmp_path: Path) -> None:
    files = {"data/train.jsonl": b'{"a":1}\n', "data/test.parquet": b"PAR1xxxxPAR1", "load.py": b"import os"}
    hub.add("org/data", files, kind="dataset")
    manifest = pull("hf://datasets/org/data", tmp_path / "out")
    assert (manifest.kind, manifest.format) == ("dataset", "jsonl")
    assert set(contents(tmp_path / "out")) == {"data/train.jsonl", "data/test.parquet"}


def test_of_a_dataset_only_what_is_chosen_is_fetched(hub: Hub, tmp_path: Path) -> None:
    files = {"train.jsonl": b'{"a":1}\n', "test.jsonl": b'{"a":2}\n', "all.parquet": b"PAR1xxxxPAR1"}
    hub.add("org/data", files, kind="dataset")
    uri, seen = "hf://datasets/org/data", list[str]()
    digest = resolve(uri)
    hub.requests.clear()

    def choose(paths: Sequence[str]) -> list[str]:
        seen[:] = paths
        return ["train.jsonl"]

    found = pull(uri, tmp_path / "out", choose=choose)
    assert seen == sorted(files)
    assert found.digest == digest  # of the whole
    assert contents(tmp_path / "out") == {"train.jsonl": files["train.jsonl"]}
    assert not [path for path in hub.gets() if path.endswith("all.parquet")]
    pull(uri, tmp_path / "out", choose=lambda _: ["all.parquet"])
    assert contents(tmp_path / "out") == {"all.parquet": files["all.parquet"]}
    assert pull(uri, tmp_path / "out") == found
    assert contents(tmp_path / "out") == files


def test_what_cannot_be_chosen_is_said_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/data", {"train.jsonl": b'{"a":1}\n'}, kind="dataset")

    def none(paths: Sequence[str]) -> list[str]:
        raise KeyError(*paths)

    with pytest.raises(KeyError, match=r"train\.jsonl"):
        pull("hf://datasets/org/data", tmp_path / "out", choose=none)
    assert len(hub.requests) == 1
    assert not (tmp_path / "out").exists()


def test_pickles_only_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/old", {"pytorch_model.bin": b"PK\x03\x04", "config.json": b"{}"})
    with pytest.raises(ArtifactError, match="pickled weights only") as caught:
        pull("hf://org/old", tmp_path / "out")
    assert caught.value.reason == "UnsupportedFormat"
    assert "safetensors" in caught.value.message


def test_cut_connections_resume(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", MODEL)
    hub.cut_after, hub.cuts = 1 << 20, 3
    pull("hf://org/tiny", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == MODEL["model.safetensors"]
    ranges = [
        headers["Range"] for _, path, headers in hub.requests if "model.safetensors" in path and "Range" in headers
    ]
    assert len(set(ranges)) == 3


def test_servers_without_ranges_start_over(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", MODEL)
    hub.ranges, hub.cut_after, hub.cuts = False, 1 << 20, 2
    pull("hf://org/tiny", tmp_path / "out")
    assert contents(tmp_path / "out")["model.safetensors"] == MODEL["model.safetensors"]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"], ids=["large file", "small file"])
def test_damaged_files_are_refused(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.add("org/tiny", MODEL)
    hub.corrupt = {path}
    with pytest.raises(ArtifactError, match=path) as caught:
        pull("hf://org/tiny", tmp_path / "out")
    assert caught.value.reason == "DigestMismatch"
    assert not (tmp_path / "out").exists()


def test_busy_hub_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", MODEL)
    hub.busy = 2
    assert pull("hf://org/tiny", tmp_path / "out").digest
    hub.busy = 1000
    with pytest.raises(ArtifactError) as caught:
        resolve("hf://org/tiny")
    assert caught.value.retryable


def test_private_and_gated(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/secret", MODEL).private = True
    assert resolve("hf://org/secret") is None
    with pytest.raises(ArtifactError, match="HF_TOKEN") as caught:
        pull("hf://org/secret", tmp_path / "out")
    assert caught.value.reason == "SourceNotFound"
    pull("hf://org/secret", tmp_path / "out", secret={"HF_TOKEN": "hf_good"})
    hub.add("org/gated", MODEL).gated = True
    with pytest.raises(ArtifactError) as caught:
        pull("hf://org/gated", tmp_path / "gated", secret={"token": b"hf_bad\n"})
    assert caught.value.reason == "AccessDenied"
    assert "hf_bad" not in str(caught.value)
    assert "is gated. Ask for access" in caught.value.message


def test_a_token_that_opens_nothing_is_named_as_a_cause(hub: Hub, tmp_path: Path) -> None:
    """The Hub says 404 of what the asker may not see, and 401 to a token that it does not know."""
    hub.add("org/secret", MODEL).private = True
    with pytest.raises(ArtifactError, match="or it is private and no HF_TOKEN was given") as caught:
        pull("hf://org/secret", tmp_path / "out")
    with pytest.raises(ArtifactError, match="or the HF_TOKEN in the Secret has no access") as caught:
        pull("hf://org/secret", tmp_path / "out", secret={"HF_TOKEN": "hf_other"})
    assert caught.value.reason == "SourceNotFound"
    hub.add("org/tiny", MODEL)
    hub.revoked = "hf_old"
    with pytest.raises(ArtifactError, match="knows no such HF_TOKEN") as caught:
        pull("hf://org/tiny", tmp_path / "out", secret={"HF_TOKEN": "hf_old"})
    assert caught.value.reason == "AccessDenied"
    assert str(caught.value.from_secret("hub")).endswith(" The Secret is hub.")
    assert "hf_old" not in str(caught.value)


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", MODEL).private = True
    pull("hf://org/tiny", tmp_path / "out", secret={"HF_TOKEN": "hf_good"})
    to_storage = [headers for _, path, headers in hub.requests if "X-Signature" in path]
    assert to_storage
    assert not any("Authorization" in headers for headers in to_storage)


def test_absent_revision_and_absent_repository(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", MODEL)
    assert resolve("hf://org/tiny@v9") is None
    assert resolve("hf://org/none") is None
    with pytest.raises(ArtifactError, match="org/tiny@v9") as caught:
        pull("hf://org/tiny@v9", tmp_path / "out")
    assert caught.value.reason == "SourceNotFound"


def test_no_hub_at_the_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError) as caught:
        pull("hf://org/tiny", tmp_path / "out")
    assert caught.value.reason == "SourceUnavailable"


@pytest.mark.parametrize("endpoint", ["hub.example.com", "ftp://x", "http://"])
def test_a_bad_endpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ArtifactError, match="HF_ENDPOINT"):
        pull("hf://org/tiny", tmp_path / "out")


def test_hostile_file_names_of_a_hub(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/evil", {"model.safetensors": safetensors(), "a/../../evil.json": b"{}"})
    with pytest.raises(ArtifactError):
        pull("hf://org/evil", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.json"))


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="the official client is not installed")
def test_the_official_client_reads_this_hub(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", MODEL)
    code = "import huggingface_hub as h, sys; h.snapshot_download('org/tiny', local_dir=sys.argv[1])"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], env=env, check=True, capture_output=True)
    for path, content in MODEL.items():
        assert (tmp_path / "out" / path).read_bytes() == content


def test_served_from_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "root", {f"org/tiny/{path}": MODEL[path] for path in KEPT})
    write(tmp_path / "root", {"datasets/org/data/train.jsonl": b"{}\n"})
    server = Path(__file__).with_name("hub.py")
    command = [sys.executable, str(server), "--port", "0", "--root", str(tmp_path / "root")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "2 repositories" in line
        os.environ["HF_ENDPOINT"] = line.strip().rpartition("=")[2]
        pull("hf://org/tiny", tmp_path / "out")
        digest = hashlib.sha256((tmp_path / "out/config.json").read_bytes()).hexdigest()
        assert digest == hashlib.sha256(MODEL["config.json"]).hexdigest()
        pull("hf://datasets/org/data", tmp_path / "data")
    finally:
        os.environ.pop("HF_ENDPOINT", None)
        process.kill()
        process.wait()
