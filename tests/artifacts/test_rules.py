"""Pure rules: URIs, formats, names, the manifest; then the command line."""

from __future__ import annotations

import json
import pickle
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from artifact_support import ROOT, Registry, run_cli, safetensors, write

from slmops_artifacts import ArtifactError, Manifest, Parent, pull, push, read_manifest, resolve
from slmops_artifacts.cli import main
from slmops_artifacts.formats import check_content, check_files, detect_format
from slmops_artifacts.registry_auth import _match
from slmops_artifacts.uris import parse

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


@pytest.mark.parametrize(
    "uri",
    [
        "oci://registry:5000/team/model:v1",
        f"oci://r.example.com/a/b/c@{A}",
        f"oci://r/a:v1@{A}",
        "oci://[::1]:5000/a:v1",
        "hf://org/Name.v1-x@main",
        "hf://gpt2@main",
        "hf://datasets/org/d@refs/pr/1",
        "pvc://claim/a/b",
        f"pvc://claim/a@{A}",
        "file:///a/b",
    ],
)
def test_good_uris_read_back(uri: str) -> None:
    assert str(parse(uri)) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "model",
        "s3://bucket/key",
        "oci://",
        "oci://host",
        "oci://host/UPPER:v1",
        "oci://host/a:",
        "oci://host/a@sha256:12",
        "oci://host/../a",
        "oci://host/a/../b:v1",
        "oci://user:hunter2@host/a:v1",
        "hf://",
        "hf://a/b/c",
        "hf://../x",
        "hf://a/b@",
        "hf://a/b@../..",
        "file://relative",
        "oci://host:99999999/a",
        "oci://host:99999/a",
        "oci://ho st/a",
    ],
)
def test_bad_uris_are_refused_with_a_sentence(uri: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse(uri)
    assert caught.value.reason == "BadUri"
    assert caught.value.message.endswith(".")
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("files", "fmt"),
    [
        (["model.safetensors", "config.json"], "safetensors"),
        (["model.onnx", "model.onnx.data", "genai_config.json"], "onnx"),
        (["model.onnx", "model.onnx_data"], "onnx"),
        (["openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_tokenizer.bin"], "openvino"),
        (["Model.Q4_K_M.GGUF"], "gguf"),
        (["train.jsonl", "README.md"], "jsonl"),
        (["adapter_model.safetensors", "plots/loss.png", "LICENSE", "LICENSE-MODEL.txt"], "safetensors"),
    ],
)
def test_formats_are_found_out(files: list[str], fmt: str) -> None:
    assert detect_format(check_files(files, "x")) == fmt


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "optimizer.pth",
        "x.pkl",
        "X.CKPT",
        "training_args.bin",
        "modeling.py",
        "run.sh",
        "lib.so",
        "other.exe",
        "mystery.zzz",
        "weights.npy",
    ],
)
def test_code_and_pickles_are_refused_whole(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"model.safetensors": safetensors(), name: b"x", "pytorch_model.xml": b"<net"})
    with pytest.raises(ArtifactError, match=name) as caught:
        push(source, f"file://{tmp_path}/out", Manifest(kind="model"))
    assert caught.value.reason == "UnsupportedFormat"
    with pytest.raises(ArtifactError):
        pull(f"file://{source}", tmp_path / "pulled")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", pickle.dumps({"a": 1})),
        ("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", b""),
        ("model.gguf", b"PK\x03\x04"),
        ("train.parquet", b"nope"),
        ("weights.data", b"\x7fELF\x02\x01\x01" + bytes(99)),
        ("model.onnx_data", bytes.fromhex("cffaedfe07000001") + bytes(99)),
        ("notes.txt", b"MZ" + bytes(58) + (80).to_bytes(4, "little") + bytes(16) + b"PE\0\0"),
    ],
)
def test_a_friendly_name_does_not_hide_another_format(name: str, data: bytes, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {name: data})
    for action in (
        lambda: push(source, f"file://{tmp_path}/out", Manifest(kind="model")),
        lambda: pull(f"file://{source}", tmp_path / "out"),
    ):
        with pytest.raises(ArtifactError, match=name) as caught:
            action()
        assert caught.value.reason == "UnsupportedFormat"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("data", [b"MZ", b"MZ" + bytes(99), b"MZ" + b"\xff" * 99, b"\x7fEL", b""])
def test_weights_may_begin_with_any_numbers(data: bytes, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"model.onnx": b"x", "model.onnx.data": data})
    push(source, f"file://{tmp_path}/out", Manifest(kind="model"))
    pull(f"file://{tmp_path}/out", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "model.onnx.data").read_bytes() == data


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "set", {"train.jsonl": b'{"prompt": "a"}\n'})
    (tmp_path / "set/train.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"train\.jsonl"):
        check_content("train.jsonl", tmp_path / "set/train.jsonl", "set")


def test_an_empty_folder_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ArtifactError, match="no files"):
        push(tmp_path / "in", f"file://{tmp_path}/out", Manifest(kind="model"))


def test_lineage_is_nearest_first_without_doubles() -> None:
    base = Manifest(kind="model", digest=A)
    data = Manifest(kind="dataset", digest=B)
    student = Manifest(kind="model").derived_from("u:base", base).derived_from("u:data", data)
    student = student.model_copy(update={"digest": C})
    tuned = Manifest(kind="model").derived_from("u:student", student, "FineTuneJob/x").derived_from("u:data", data)
    assert [parent.uri for parent in tuned.parents] == ["u:student", "u:data"]
    assert [parent.uri for parent in tuned.lineage] == ["u:student", "u:data", "u:base"]
    assert tuned.lineage[0].name == "FineTuneJob/x"
    by_hand = Manifest(kind="model", parents=(Parent(kind="model", uri="p", digest=A),)).completed()
    assert [parent.uri for parent in by_hand.lineage] == ["p"]


def test_errors_survive_a_process_pool() -> None:
    error = pickle.loads(pickle.dumps(ArtifactError("DiskFull", "full")))
    assert (error.reason, error.message, error.retryable) == ("DiskFull", "full", False)


def test_credentials_of_the_longest_prefix_win() -> None:
    auths = {
        "*.example.com": {"username": "star", "password": "p"},
        "https://r.example.com/v1/": {"username": "host", "password": "p"},
        "r.example.com/team": {"username": "team", "password": "p"},
        "https://index.docker.io/v1/": {"auth": "aHViOnA6cA=="},
        "[fd00::5]:5000": {"username": "six", "password": "p"},
    }
    assert _match(auths, "a.example.com", "x")[0] == "star"
    assert _match(auths, "r.example.com", "teams/x")[0] == "host"
    assert _match(auths, "r.example.com", "team/x")[0] == "team"
    assert _match(auths, "registry-1.docker.io", "x")[:2] == ("hub", "p:p")
    assert _match(auths, "[fd00::5]:5000", "x")[0] == "six"
    assert _match(auths, "example.org", "x") == ("", "", "")


class _TokenRegistry(BaseHTTPRequestHandler):
    """A registry behind a token server; its blobs are kept on another origin."""

    seen: ClassVar[list[tuple[str, str]]]
    elsewhere: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization", "")
        type(self).seen.append((self.path.split("?")[0], authorization))
        if self.path.startswith("/token"):
            good = authorization == "Basic YW5uOnMzY3JldA=="
            self._send(200 if good else 401, json.dumps({"token": "t0ken"} if good else {}).encode())
        elif authorization != "Bearer t0ken":
            realm = f'Bearer realm="http://{self.headers["Host"]}/token",service="s",scope="repository:a:pull"'
            self._send(401, b"", {"WWW-Authenticate": realm})
        elif "/manifests/" in self.path:
            self._send(307, b"", {"Location": f"{self.elsewhere}/stolen?signature=1"})
        else:
            self._send(404, b"")

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def test_tokens_are_fetched_and_not_sent_abroad(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(_TokenRegistry):
        seen: ClassVar[list[tuple[str, str]]] = []
        elsewhere = ""

    class Home(_TokenRegistry):
        seen: ClassVar[list[tuple[str, str]]] = []

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (Elsewhere, Home)]
    Home.elsewhere = f"http://127.0.0.1:{servers[0].server_address[1]}"
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    host = f"127.0.0.1:{servers[1].server_address[1]}"
    monkeypatch.setenv("SLMOPS_PLAIN_HTTP", host)
    try:
        with pytest.raises(ArtifactError, match="refused access"):
            resolve(f"oci://{host}/a:v1", secret={"username": "ann", "password": "s3cret"})
        assert ("/token", "Basic YW5uOnMzY3JldA==") in Home.seen
        assert Home.seen[-1] == ("/v2/a/manifests/v1", "Bearer t0ken")
        assert Elsewhere.seen
        assert {authorization for _, authorization in Elsewhere.seen} == {""}
        with pytest.raises(ArtifactError, match="gave no token") as caught:
            resolve(f"oci://{host}/a:v1", secret={"username": "ann", "password": "wr0ng"})
        assert caught.value.reason == "AccessDenied"
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def test_the_command_line(registry: Registry, model: Path, tmp_path: Path) -> None:
    uri = f"oci://{registry.host}/cli:v1"

    def run(*args: str) -> tuple[int, str, str]:
        process = run_cli(*args, "--termination-log", str(tmp_path / "log"))
        out, err = process.communicate()
        return process.returncode, out.decode().strip(), err.decode().strip()

    code, pinned, err = run("push", str(model), uri)
    assert (code, err.count("\n")) == (0, 0)
    assert "100 %" in err
    digest = pinned.rpartition("@")[2]
    assert run("resolve", uri)[:2] == (0, digest)
    assert run("pull", pinned, str(tmp_path / "out"))[:2] == (0, digest)
    data = write(tmp_path / "data", {"train.jsonl": b"{}\n"})
    _, second, _ = run("push", str(data), f"oci://{registry.host}/cli:d", "--kind", "dataset", "--parent", pinned)
    shown = json.loads(run("show", second)[1])
    assert (shown["kind"], shown["format"], shown["lineage"][0]["digest"]) == ("dataset", "jsonl", digest)
    assert run("delete", second)[:2] == (0, second.rpartition("@")[2])
    assert run("resolve", uri)[:2] == (0, digest)
    assert not (tmp_path / "log").exists()
    for verb in ("show", "delete"):
        code, out, err = run(verb, f"oci://{registry.host}/cli:d")
        assert (code, out) == (3, "")
        assert err.startswith("SourceNotFound: There is nothing at ")

    code, out, err = run("pull", f"oci://{registry.host}/none:v1", str(tmp_path / "none"))
    assert (code, out) == (3, "")
    assert err.startswith("SourceNotFound: ")
    assert "\n" not in err
    told = json.loads((tmp_path / "log").read_text())
    assert told == {"reason": "SourceNotFound", "message": err.partition(": ")[2]}
    registry.stop()
    assert run("resolve", uri)[0] == 1
    assert run("pull", "nonsense", str(tmp_path / "none"))[0] == 3
    assert run("push", str(tmp_path / "absent"), uri)[0] == 3


def test_the_readme_s_example_works(registry: Registry, model: Path, tmp_path: Path) -> None:
    """With folders in the place of the Hub and of what lies on a pod."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "images/artifacts/README.md").read_text(), re.DOTALL)
    here = {
        "hf://org/name@main": f"file://{model}",
        "/models/base": str(tmp_path / "base"),
        'Path("out")': f"Path({str(model)!r})",
        "registry:5000": registry.host,
    }
    assert all(text in code for text in here)
    for text, local in here.items():
        code = code.replace(text, local)
    said: dict[str, Any] = {}
    exec(code, said)
    assert read_manifest(said["uri"]) == said["tuned"]
    assert [parent.digest for parent in said["tuned"].lineage] == [said["base"].digest]


def test_the_termination_message_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    name = "é" * 3000
    assert main(["pull", f"oci://host/{name}", str(tmp_path / "out"), "--termination-log", str(log)]) == 3
    assert len(log.read_bytes()) <= 4096
    assert json.loads(log.read_text())["reason"] == "BadUri"
    assert "Traceback" not in capsys.readouterr().err
