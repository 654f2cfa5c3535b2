"""Stores that say nothing, and stores that ask to be left alone: given up in time, by name."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from artifact_support import Nobody, run_cli, safetensors, uploaded
from hub import Hub

from slmops_artifacts import ArtifactError, pull, read_manifest, transfer, upload
from slmops_artifacts.registry_auth import RegistryAuth

SOON = 20.0
"""Seconds: far below the minute that is promised, far above what a loaded machine needs."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_LEAST_READ", 0.3)


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("SLMOPS_PLAIN_HTTP", host)
        monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
        yield host


@pytest.mark.parametrize("uri", ["oci://{host}/a:v1", "hf://org/tiny"])
def test_a_store_that_takes_the_connection_and_never_answers(mute: str, tmp_path: Path, uri: str) -> None:
    began = time.monotonic()
    with pytest.raises(ArtifactError, match="said nothing") as caught:
        pull(uri.format(host=mute), tmp_path / "out", patience=0.6)
    assert caught.value.reason == "SourceUnavailable"
    assert caught.value.retryable
    assert time.monotonic() - began < SOON


def test_sigterm_ends_a_pull_that_waits_for_its_store(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SOON)
        host = f"127.0.0.1:{server.getsockname()[1]}"
        puller = run_cli("pull", f"oci://{host}/a:v1", str(tmp_path / "out"), env={"SLMOPS_PLAIN_HTTP": host})
        waiting, _ = server.accept()
        with waiting:
            puller.send_signal(signal.SIGTERM)
            _, said = puller.communicate(timeout=SOON)
    assert puller.returncode == 130
    assert said.startswith(b"Interrupted;")


def test_a_store_that_stops_in_the_middle_of_a_file(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", {"model.safetensors": safetensors(1 << 20), "config.json": b"{}"})
    hub.cut_after, hub.stalls = 1000, 1000
    began = time.monotonic()
    with pytest.raises(ArtifactError, match="said nothing"):
        pull("hf://org/tiny", tmp_path / "out", patience=0.6)
    assert time.monotonic() - began < SOON
    hub.stalls = 1
    assert pull("hf://org/tiny", tmp_path / "out", patience=5).size_bytes > 1 << 20


def test_silence_is_given_a_minute_and_outages_the_whole_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(transfer.time, "monotonic", lambda: now)
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)
    silent = ArtifactError("SourceUnavailable", "silent", silent=True)
    refused = ArtifactError("SourceUnavailable", "refused")
    for failure, last, before in ((silent, 59.0, 0.0), (refused, 299.0, 0.0), (refused, 299.0, 1000.0)):
        now = 0.0
        patience = transfer.Patience(300.0)
        now = before  # so long it worked, and then it began to fail
        patience.wait(failure)
        now = before + last - 1
        patience.wait(failure)
        now = before + last + 1
        with pytest.raises(ArtifactError):
            patience.wait(failure)
    now = 0.0
    patience = transfer.Patience(300.0)
    now = 61.0  # what says nothing does so from the beginning
    with pytest.raises(ArtifactError):
        patience.wait(silent)


def test_a_store_that_is_away_is_given_up_after_the_patience_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_PLAIN_HTTP", "127.0.0.1:9")
    monkeypatch.setenv("SLMOPS_RETRY_SECONDS", "1000")
    with pytest.raises(ArtifactError, match="cannot be reached"):
        read_manifest("oci://127.0.0.1:9/a:v1", patience=0.5)


@pytest.mark.parametrize("trouble", [httpx.Response(503), httpx.ConnectError("refused")])
def test_a_token_server_that_is_busy_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, trouble: httpx.Response | httpx.HTTPError
) -> None:
    answers: list[httpx.Response | httpx.HTTPError] = [
        trouble,
        httpx.Response(200, json=["no", "token"]),
        httpx.Response(200, json={"token": "t0ken"}),
    ]

    def token(*_: object, **__: object) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, httpx.HTTPError):
            raise answer
        return answer

    def registry(request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != "Bearer t0ken":
            return httpx.Response(401, headers={"WWW-Authenticate": 'Bearer realm="https://auth/token",service="s"'})
        return httpx.Response(200, content=b"{}")

    monkeypatch.setattr(httpx, "get", token)
    base = httpx.URL("https://registry/v2/a/")
    http = transfer.Http("registry", RegistryAuth(base, "registry", "a", "pull", None), 30)
    http.client = httpx.Client(transport=httpx.MockTransport(registry))
    with pytest.raises(ArtifactError, match="gave no token") as caught:
        http.request("GET", f"{base}manifests/v1")
    assert caught.value.reason == "AccessDenied"  # the busy one was waited for, the odd one is no token
    assert http.request("GET", f"{base}manifests/v1").status == 200


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        (format_datetime(datetime.now(UTC) + timedelta(seconds=3000), usegmt=True), 2000, 3000),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str, least: float, most: float) -> None:
    assert least <= transfer.retry_after(httpx.Response(429, headers={"Retry-After": value})) <= most


def test_a_chunk_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is slow to take 64 MiB is not a registry that says nothing; a pod that is told to end has 60 s."""
    monkeypatch.setattr(upload, "CHUNK_SIZE", 1000)
    sent: list[str] = []

    def registry(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(202, headers={"Location": "/v2/a/blobs/uploads/1"})
        wait = request.extensions["timeout"]["read"]
        if wait < 25 or (request.method == "PATCH" and wait > 40):
            raise httpx.ReadTimeout("25 s", request=request)
        sent.append(request.headers["Content-Range"])
        return httpx.Response(202 if request.method == "PATCH" else 201)

    uploaded(registry, patience=15)
    assert sent == ["0-999", "1000-1999", "2000-2999"]


def test_a_chunk_whose_answer_is_lost_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that took: the registry may have it, and all before it."""
    monkeypatch.setattr(upload, "CHUNK_SIZE", 1000)
    monkeypatch.setattr(transfer.time, "sleep", lambda _: None)
    now, log = [0.0], []
    monkeypatch.setattr(transfer.time, "monotonic", lambda: now[0])

    def registry(request: httpx.Request) -> httpx.Response:
        log.append(f"{request.method} {request.headers.get('Content-Range', '')}".strip())
        if request.method == "POST":
            return httpx.Response(202, headers={"Location": "/v2/a/blobs/uploads/1"})
        if len(log) == 3:
            now[0] += request.extensions["timeout"]["read"]
            raise httpx.ReadTimeout("lost", request=request)
        if request.method == "GET":
            return httpx.Response(204, headers={"Location": "/v2/a/blobs/uploads/1", "Range": "0-1999"})
        return httpx.Response(202 if request.method == "PATCH" else 201)

    uploaded(registry, patience=15)
    assert log == ["POST", "PATCH 0-999", "PATCH 1000-1999", "GET", "PUT 2000-2999"]


@pytest.mark.parametrize("trouble", ["refused", "token", 503, 429])
def test_a_registry_that_is_away_has_forgotten_no_upload(monkeypatch: pytest.MonkeyPatch, trouble: int | str) -> None:
    """It goes on where the registry got to, however long the registry cannot say how far that is."""
    monkeypatch.setattr(upload, "CHUNK_SIZE", 1000)
    monkeypatch.setattr(transfer.time, "sleep", lambda _: None)
    log: list[str] = []

    def registry(request: httpx.Request) -> httpx.Response:
        log.append(f"{request.method} {request.headers.get('Content-Range', '')}".strip())
        if request.method == "POST":
            return httpx.Response(202, headers={"Location": "/v2/a/blobs/uploads/1"})
        if len(log) == 3:
            raise httpx.ReadError("cut off")
        if 3 < len(log) < 7:
            if trouble == "token":
                raise ArtifactError("SourceUnavailable", "The token server does not work now.")
            if isinstance(trouble, int):
                return httpx.Response(trouble)
            raise httpx.ConnectError("refused")
        if request.method == "GET":
            return httpx.Response(204, headers={"Location": "/v2/a/blobs/uploads/1", "Range": "0-1499"})
        return httpx.Response(202 if request.method == "PATCH" else 201)

    uploaded(registry)
    assert log[:3] == ["POST", "PATCH 0-999", "PATCH 1000-1999"]
    assert set(log[3:-2]) == {"GET"}
    assert log[-2:] == ["PATCH 1500-2499", "PUT 2500-2999"]


@pytest.mark.parametrize("status", [404, 416])
def test_an_upload_that_the_registry_has_forgotten_begins_anew(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(upload, "CHUNK_SIZE", 2000)
    monkeypatch.setattr(transfer.time, "sleep", lambda _: None)
    log: list[str] = []

    def registry(request: httpx.Request) -> httpx.Response:
        log.append(request.method)
        if request.method == "POST":
            return httpx.Response(202, headers={"Location": "/v2/a/blobs/uploads/1"})
        return httpx.Response({2: 502, 3: status}.get(len(log), 202 if request.method == "PATCH" else 201))

    uploaded(registry)
    assert log == ["POST", "PATCH", "GET", "POST", "PATCH", "PUT"]


@pytest.mark.parametrize("first", [True, False], ids=["begun", "went on"])
@pytest.mark.parametrize("host", ["registry", "elsewhere"])
def test_no_upload_leads_out_of_tls(monkeypatch: pytest.MonkeyPatch, first: bool, host: str) -> None:
    monkeypatch.setattr(upload, "CHUNK_SIZE", 2000)
    asked: list[httpx.URL] = []

    def registry(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        plain = first or request.method == "PATCH"
        return httpx.Response(202, headers={"Location": f"http://{host}/u" if plain else "/v2/a/blobs/uploads/1"})

    with pytest.raises(ArtifactError, match="X-Forwarded-Proto") as caught:
        uploaded(registry)
    assert caught.value.reason == "AccessDenied"
    assert {url.scheme for url in asked} == {"https"}


def test_no_redirect_leads_out_of_tls() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(302, headers={"Location": "http://elsewhere/x"})

    http = transfer.Http("oci://registry/a:v1", Nobody())
    http.client = httpx.Client(transport=httpx.MockTransport(answer))
    with pytest.raises(ArtifactError, match="plain HTTP") as caught:
        http.request("GET", "https://registry/v2/a/manifests/v1")
    assert not caught.value.retryable
    assert asked == ["https://registry/v2/a/manifests/v1"]
