"""Registries behind TLS: whose certificates are trusted, and what to do about the others."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml
from artifact_support import ROOT, Registry

from slmops_artifacts import ArtifactError, Manifest, pull, push, resolve
from slmops_artifacts.trust import trusted

PLAIN = Manifest(kind="model")


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """A CA of our own without keyUsage, ca.crt, and server.crt and server.key of 127.0.0.1."""
    folder = tmp_path / "pki"
    folder.mkdir()
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    ca = ["-subj", "/CN=our own", "-keyout", "ca.key", "-out", "ca.crt"]
    signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"]
    server = ["-subj", "/CN=server", *signed, "-keyout", "server.key", "-out", "server.crt"]
    for more in (ca, server):
        subprocess.run([*make, *more], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are checked as strictly as Python 3.13 does unasked."""
    usual = httpx.create_ssl_context

    def create() -> ssl.SSLContext:
        context = usual()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(httpx, "create_ssl_context", create)


@pytest.fixture
def guarded(tmp_path: Path, pki: Path) -> Iterator[Registry]:
    """A registry behind TLS, with a certificate of that CA."""
    (tmp_path / "guarded").mkdir()
    server = Registry(tmp_path / "guarded", tls=pki)
    server.start()
    yield server
    server.stop()


def test_a_ca_of_ones_own_is_trusted_where_the_credentials_name_it(
    guarded: Registry, pki: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"oci://{guarded.host}/team/tiny:v1"
    with pytest.raises(ArtifactError, match=r"not trusted here \(.+\).* as ca.crt into the Secret") as caught:
        push(model, uri, PLAIN)
    assert caught.value.reason == "AccessDenied"
    bundle = f"# Autorité\n{(pki / 'ca.crt').read_text()}"
    pinned, pushed = push(model, uri, PLAIN, secret={"ca.crt": bundle})
    assert pull(pinned, tmp_path / "one", secret={"ca.crt": bundle.encode()}) == pushed
    store = tmp_path / "store"  # as the store's Secret is mounted
    store.mkdir()
    (store / "ca.crt").write_text(bundle)
    for config in (store / ".dockerconfigjson", store):
        monkeypatch.setenv("SLMOPS_REGISTRY_AUTH", str(config))
        assert resolve(uri) == pushed.digest
    with pytest.raises(ArtifactError, match=r"ca.crt in the Secret holds no certificate") as caught:
        resolve(uri, secret={"ca.crt": "none"})
    assert caught.value.reason == "AccessDenied"


@pytest.mark.usefixtures("strict")
def test_a_ca_of_ones_own_may_lack_what_new_pythons_ask_for(guarded: Registry, pki: Path) -> None:
    uri = f"oci://{guarded.host}/team/tiny:v1"
    assert resolve(uri, secret={"ca.crt": (pki / "ca.crt").read_text()}) is None  # asked, and not there
    assert trusted(None).verify_flags & ssl.VERIFY_X509_STRICT  # the usual authorities have to be as they should


class _TokenRegistry(BaseHTTPRequestHandler):
    """A registry that wants a token, and its token server."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer t0ken"
        token = self.path.startswith("/token")
        body = json.dumps({"token": "t0ken"} if token else {}).encode()
        self.send_response(200 if token else 404 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("WWW-Authenticate", f'Bearer realm="https://{self.headers["Host"]}/token",service="s"')
        self.end_headers()
        self.wfile.write(body)


def test_a_token_server_behind_the_same_ca_is_trusted_too(pki: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _TokenRegistry) as server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pki / "server.crt", pki / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            uri = f"oci://127.0.0.1:{server.server_address[1]}/a:v1"
            assert resolve(uri, secret={"ca.crt": (pki / "ca.crt").read_text()}) is None
        finally:
            server.shutdown()
            thread.join()


def test_remedies_name_what_there_is(guarded: Registry, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load((ROOT / "charts/slmops/values.yaml").read_text())
    monkeypatch.delenv("SLMOPS_PLAIN_HTTP")
    named = []
    for host in (guarded.host, registry.host):  # one has a CA of its own, one speaks no TLS
        with pytest.raises(ArtifactError) as caught:
            resolve(f"oci://{host}/a:v1")
        assert "SSL_CERT_FILE" not in caught.value.message, "a pod has nowhere to mount such a file"
        named += re.findall(r"chart's store\.(\w+)", caught.value.message)
    assert named == ["secretName", "plainHttp"]
    assert set(named) <= set(values["store"])
