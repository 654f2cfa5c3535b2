"""Credentials for OCI registries: a mounted Docker config, a Secret's keys, basic and token authentication."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from .errors import ArtifactError
from .transfer import unreachable

_PARAMETER = re.compile(r'([a-zA-Z_]+)="((?:[^"\\]|\\.)*)"')


def secret_text(secret: Mapping[str, Any] | None, *keys: str) -> str:
    """Return the first of `keys` that the Secret has, as text."""
    for key in keys:
        value = (secret or {}).get(key)
        if value:
            return (value.decode() if isinstance(value, bytes) else str(value)).strip()
    return ""


def plain_http(host: str) -> bool:
    """Tell hosts of plain HTTP (named in SLMOPS_PLAIN_HTTP) from the others."""
    return host in [item.strip() for item in os.environ.get("SLMOPS_PLAIN_HTTP", "").split(",")]


class RegistryAuth:
    """Signs requests to one repository. Credentials are read once and sent to that registry only."""

    def __init__(
        self,
        base: httpx.URL,
        host: str,
        repository: str,
        actions: str,
        secret: Mapping[str, Any] | None,
        trust: ssl.SSLContext | bool = True,
    ) -> None:
        self._base = base
        self._repository = repository
        self._actions = actions
        self._host = host
        self._trust = trust
        self._user, self._password, self._identity = _find(host, repository, secret)
        self._header = ""

    def headers(self, url: httpx.URL) -> dict[str, str]:
        """Return the Authorization header, once the registry has asked for it, and only for its own origin."""
        own = (url.scheme, url.host, url.port) == (self._base.scheme, self._base.host, self._base.port)
        return {"Authorization": self._header} if self._header and own else {}

    def challenge(self, response: httpx.Response) -> bool:
        """Answer `WWW-Authenticate`. A token that ran out is replaced; a refusal stays a refusal."""
        url = response.request.url
        if (url.scheme, url.host, url.port) != (self._base.scheme, self._base.host, self._base.port):
            return False
        kind, _, rest = response.headers.get("www-authenticate", "").partition(" ")
        if kind.lower() == "basic" and self._user:
            again = self._header != (header := self._basic())
            self._header = header
            return again
        if kind.lower() == "bearer":
            self._header = f"Bearer {self._token(dict(_PARAMETER.findall(rest)))}"
            return True
        return False

    def _basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self._user}:{self._password}".encode()).decode()

    def _token(self, challenge: dict[str, str]) -> str:
        realm = self._base.join(challenge.get("realm", ""))
        known = self._user or self._identity
        if known and realm.scheme != "https" and self._base.scheme == "https":
            raise ArtifactError("AccessDenied", f"{self._host} wants its password sent in clear text. Not done.")
        scope = challenge.get("scope") or f"repository:{self._repository}:{self._actions}"
        service = challenge.get("service", "")
        try:
            if self._identity:
                form = {"grant_type": "refresh_token", "refresh_token": self._identity, "client_id": "slmops"}
                form |= {"service": service, "scope": scope}
                response = httpx.post(realm, data=form, timeout=30.0, verify=self._trust)
            else:
                headers = {"Authorization": self._basic()} if self._user else {}
                query = {"service": service, "scope": scope, "client_id": "slmops"}
                url = realm.copy_merge_params(query)
                response = httpx.get(url, headers=headers, timeout=30.0, verify=self._trust)
            if response.status_code >= 500 or response.status_code == 429:
                raise ArtifactError(
                    "SourceUnavailable",
                    f"The token server of {self._host} does not work now (HTTP {response.status_code}). Try later.",
                )
            document = response.json() if response.status_code == 200 else {}
            known_form = document if isinstance(document, dict) else {}
            token = known_form.get("token") or known_form.get("access_token")
        except httpx.HTTPError as error:
            raise unreachable(error, f"The token server of {self._host}") from error
        except ValueError:
            token = None
        if not isinstance(token, str) or not token or not (token.isascii() and token.isprintable()):
            raise ArtifactError(
                "AccessDenied",
                f"{self._host}/{self._repository}: the registry's token server gave no token "
                f"(HTTP {response.status_code}). Check that the Secret holds credentials for this host.",
            )
        return token


def _find(host: str, repository: str, secret: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """User, password and identity token: from the Secret, else from the Docker config at SLMOPS_REGISTRY_AUTH."""
    user = secret_text(secret, "username")
    if user:
        return user, secret_text(secret, "password"), ""
    text = secret_text(secret, ".dockerconfigjson", "config.json")
    where = "the Secret"
    path = os.environ.get("SLMOPS_REGISTRY_AUTH", "")
    if not text and path:
        where = path
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            text = file.read_text() if file.exists() else ""
        except OSError as error:
            raise ArtifactError("AccessDenied", f"Cannot read {path}: {error.strerror}. Check the mount.") from error
    if not text:
        return "", "", ""
    try:
        auths = json.loads(text)["auths"]
        return _match(auths, host, repository)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        raise ArtifactError(
            "AccessDenied", f"The registry credentials in {where} are not a Docker config.json with 'auths'."
        ) from None


def _match(auths: dict[str, dict[str, str]], host: str, repository: str) -> tuple[str, str, str]:
    """Find the entry for the longest prefix of host/repository; a full host goes before wildcards."""
    best, found = (False, -1), {}
    for key, value in auths.items():
        name = key.split("://")[-1].rstrip("/").removesuffix("/v1").removesuffix("/v2")
        pattern, _, prefix = name.partition("/")
        if pattern in ("index.docker.io", "docker.io"):
            pattern = "registry-1.docker.io"
        fits = not prefix or repository == prefix or repository.startswith(f"{prefix}/")
        same = pattern == host  # an IPv6 address has brackets, which are no pattern's
        if fits and (same or fnmatch.fnmatchcase(host, pattern)) and (rank := (same, len(name))) > best:
            best, found = rank, value
    user, password = found.get("username", ""), found.get("password", "")
    if not user and found.get("auth"):
        user, _, password = base64.b64decode(found["auth"]).decode().partition(":")
    return user, password, found.get("identitytoken", "")
