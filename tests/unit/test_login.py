"""The watches log in as the passes do, by whatever a kubeconfig names."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config, kube_config

from slmops.handlers.watches import log_in

CREDENTIAL = {
    "apiVersion": "client.authentication.k8s.io/v1",
    "kind": "ExecCredential",
    "status": {"token": "of-a-program"},
}


@pytest.fixture
def users(tmp_path: Path) -> dict[str, dict[str, Any]]:
    (tmp_path / "token").write_text("of-a-file\n")
    plugin = {"apiVersion": CREDENTIAL["apiVersion"], "command": "echo", "args": [json.dumps(CREDENTIAL)]}
    return {
        "of-a-program": {"exec": {**plugin, "interactiveMode": "Never"}},
        "of-a-file": {"tokenFile": str(tmp_path / "token")},
        "as-it-stands": {"token": "as-it-stands"},
        "": {},
    }


@pytest.mark.parametrize("token", ["of-a-program", "of-a-file", "as-it-stands", ""])
def test_tokens_of_every_kind(
    token: str, users: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "http://api:6443", "proxy-url": "http://proxy:3128"}}],
        "users": [{"name": "u", "user": users[token]}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }  # fmt: skip
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))  # which is read at import
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = log_in()
    assert found.as_http_headers() == ({"Authorization": f"Bearer {token}"} if token else {})
    assert (found.server, found.proxy_url) == ("http://api:6443", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "api")
    assert log_in().proxy_url is None


def test_in_a_pod_it_is_the_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("token", "ca.crt"):
        (tmp_path / name).write_text(f"{name}-of-the-pod\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    for name, value in {"HOST": "10.0.0.1", "PORT": "443"}.items():
        monkeypatch.setenv(f"KUBERNETES_SERVICE_{name}", value)
    found = log_in()
    assert (found.server, found.ca_path, found.insecure) == ("https://10.0.0.1:443", str(tmp_path / "ca.crt"), False)
    assert found.as_http_headers() == {"Authorization": "bearer token-of-the-pod"}
    (tmp_path / "token").write_text("renewed")
    assert log_in().token == "renewed"
