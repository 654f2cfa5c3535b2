"""A Prometheus that wants a token, or is known by a CA of one's own; and what is told of its URL."""

import json
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from localkube.pki import Authority
from slmops.remote import prometheus
from slmops.remote.prometheus import Answer, Unreachable, Value

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
TOKEN = "eyJ.for-the.tests"


class Handler(BaseHTTPRequestHandler):
    """Answers 0.25 to who has the token."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        good = self.headers["authorization"] == f"Bearer {TOKEN}"
        body = json.dumps({"status": "success", "data": {"resultType": "scalar", "result": [1, "0.25"]}}).encode()
        self.send_response(200 if good else 401)
        self.end_headers()
        self.wfile.write(body if good else b"<html>Unauthorized</html>")

    def log_message(self, *args: object) -> None:
        pass


class Server(HTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that does not trust it goes in mid-handshake


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("pki") / "ours")
    made.server("prometheus", "prometheus", ["IP:127.0.0.1"])
    return made


@pytest.fixture
def url(authority: Authority) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.cert("prometheus"), authority.key("prometheus"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Path:
    """The Secret, mounted, as an editor saves its files."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "ca.crt").write_text(authority.cert("ca").read_text())
    return tmp_path


def asked(url: str, folder: Path) -> Answer:
    return prometheus.query(url, "up", NOW, folder=folder)


def test_a_token_and_a_ca_of_ones_own(url: str, folder: Path) -> None:
    assert asked(url, folder) == Value(0.25)


def test_a_token_that_is_renewed_is_taken(url: str, folder: Path) -> None:
    (folder / "token").write_text("old")
    said = asked(url, folder)
    assert isinstance(said, Unreachable)
    assert "HTTP 401: check key token" in said.message
    (folder / "token").write_text(TOKEN)
    assert asked(url, folder) == Value(0.25)


def test_without_its_ca_it_is_not_told_the_token_and_the_remedy_is_said(url: str, folder: Path) -> None:
    (folder / "ca.crt").unlink()
    said = asked(url, folder)
    assert isinstance(said, Unreachable)
    assert "CERTIFICATE_VERIFY_FAILED" in said.message
    assert "key ca.crt of the Secret prometheus.existingSecret" in said.message


def test_time_is_over_behind_tls_too(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.flush_headers()
        while not stop.wait(0.05):
            handler.wfile.write(b"x")

    monkeypatch.setattr(Handler, "do_POST", drip)
    monkeypatch.setattr(prometheus, "TIMEOUT_SECONDS", 0.5)
    said = asked(url, folder)
    stop.set()
    assert isinstance(said, Unreachable)
    assert "takes too long" in said.message


@pytest.mark.parametrize(
    ("key", "content", "words"),
    [
        ("token", b"secret one\nsecret two", "Key token of the Secret"),
        ("token", "sécret".encode(), "Key token of the Secret"),
        ("token", b"\xffsecret", "Key token of the Secret"),
        ("ca.crt", b"secret", "Key ca.crt of the Secret"),
        ("ca.crt", "-----BEGIN CERTIFICATE-----\nsécret\n".encode(), "Key ca.crt of the Secret"),
        ("ca.crt", b"-----BEGIN CERTIFICATE-----\nsecret\n-----END CERTIFICATE-----\n", "Key ca.crt of the Secret"),
    ],
)
def test_what_the_secret_should_not_have_is_named_and_not_shown(
    url: str, folder: Path, key: str, content: bytes, words: str
) -> None:
    (folder / key).write_bytes(content)
    said = asked(url, folder)
    assert isinstance(said, Unreachable)
    assert said.message.startswith(words)
    assert "cret one" not in said.message
    assert "sécret" not in said.message


@pytest.mark.parametrize(
    "url", ["http://jo:pa55@p:9090", "http://jo:pa/55@p:9090", "http://jo:p@55@p", "http://jo:pa#55@p"]
)
@pytest.mark.parametrize("status", [500, 401, 404, 0])
def test_no_message_has_the_password_of_the_url(url: str, status: int, tmp_path: Path) -> None:
    def handle(_: httpx.Request) -> httpx.Response:
        if status == 0:
            raise httpx.ConnectError("refused")
        return httpx.Response(status, json={"status": "error"})

    with httpx.Client(transport=httpx.MockTransport(handle)) as client:
        said = prometheus.query(url, "up", NOW, client=client, folder=tmp_path)
    assert isinstance(said, Unreachable)
    assert "55" not in said.message


def test_a_user_in_the_url_is_still_sent(tmp_path: Path) -> None:
    seen: list[str | None] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(500)

    with httpx.Client(transport=httpx.MockTransport(handle)) as client:
        prometheus.query("http://jo:pa55@p:9090", "up", NOW, client=client, folder=tmp_path)
    assert seen == ["Basic am86cGE1NQ=="]
