"""Registries that take large blobs each in its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from artifact_support import Registry, contents, safetensors, send, stand_in, uploaded, write

from slmops_artifacts import ArtifactError, Manifest, pull, push, transfer, upload

PLACE = {"Location": "/v2/a/blobs/uploads/1"}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "CHUNK_SIZE", 1000)
    monkeypatch.setattr(transfer.time, "sleep", lambda _: None)


def test_a_chunk_may_be_answered_as_created() -> None:
    log: list[str] = []

    def registry(request: httpx.Request) -> httpx.Response:
        log.append(f"{request.method} {request.headers.get('Content-Range', '')}".strip())
        return httpx.Response(202 if request.method == "POST" else 201, headers=PLACE)

    uploaded(registry)
    assert log == ["POST", "PATCH 0-999", "PATCH 1000-1999", "PUT 2000-2999"]


@pytest.mark.parametrize(("status", "taken"), [(400, 0), (405, 0), (413, 0), (416, 0), (400, 1)])
def test_a_registry_that_takes_no_chunk_gets_the_blob_whole(status: int, taken: int) -> None:
    log: list[tuple[str, str | None, int]] = []

    def registry(request: httpx.Request) -> httpx.Response:
        log.append((request.method, request.headers.get("Content-Range"), len(request.read())))
        patch = 202 if len(log) < 2 + taken else status
        return httpx.Response({"POST": 202, "PATCH": patch, "PUT": 201}[request.method], headers=PLACE)

    http = stand_in(registry)
    send(http)
    whole: list[tuple[str, str | None, int]] = [("POST", None, 0), ("PUT", None, 3000)]
    chunks = [("PATCH", f"{start}-{start + 999}", 1000) for start in range(0, 1000 * taken + 1, 1000)]
    assert log == [("POST", None, 0), *chunks, *whole]
    log.clear()
    send(http)  # it is not asked again
    assert log == whole


def test_a_blob_sent_whole_arrives(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through = transfer.Http.send

    def no_chunks(http: transfer.Http, method: str, url: str, headers: Any, body: Any = None) -> httpx.Response:
        if method == "PATCH":
            return httpx.Response(416, request=httpx.Request(method, url))
        return through(http, method, url, headers, body)

    monkeypatch.setattr(transfer.Http, "send", no_chunks)
    files = {f"{name}.safetensors": safetensors(5 << 20, name.encode()) for name in ("one", "two")}
    seen: list[int] = []
    uri, pushed = push(
        write(tmp_path / "big", files),
        f"oci://{registry.host}/big:v1",
        Manifest(kind="model"),
        progress=lambda done, _: seen.append(done),
    )
    assert seen[-1] == pushed.size_bytes
    pull(uri, tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_a_blob_sent_whole_begins_anew_after_a_fault() -> None:
    log: list[tuple[str, int]] = []

    def registry(request: httpx.Request) -> httpx.Response:
        log.append((request.method, len(request.read())))
        if request.method == "PUT" and len(log) < 5:
            return httpx.Response(502)
        return httpx.Response({"POST": 202, "PATCH": 416, "PUT": 201}[request.method], headers=PLACE)

    uploaded(registry)
    assert log == [("POST", 0), ("PATCH", 1000), ("POST", 0), ("PUT", 3000), ("POST", 0), ("PUT", 3000)]


def test_where_registry_and_we_disagree_it_is_asked_how_far_it_got() -> None:
    """The answer to a chunk that came through may be lost on the way, and a proxy then sends it once more."""
    log: list[str] = []

    def registry(request: httpx.Request) -> httpx.Response:
        log.append(f"{request.method} {request.headers.get('Content-Range', '')}".strip())
        if request.method == "GET":
            return httpx.Response(204, headers={**PLACE, "Range": "0-1999"})
        code = {1: 202, 2: 202, 3: 416}.get(len(log), 201)
        return httpx.Response(code, headers=PLACE)

    uploaded(registry)
    assert log == ["POST", "PATCH 0-999", "PATCH 1000-1999", "GET", "PUT 2000-2999"]


def test_a_registry_that_makes_no_repositories_is_told_from_one_that_forgot_an_upload() -> None:
    log: list[str] = []

    def registry(request: httpx.Request) -> httpx.Response:
        log.append(request.method)
        return httpx.Response(404, json={"errors": [{"code": "NAME_UNKNOWN"}]})

    with pytest.raises(ArtifactError, match=r"oci://registry/a:v1: .* no such repository .* Create it") as caught:
        uploaded(registry)
    assert caught.value.reason == "NoRepository"
    assert log == ["POST"]
