"""A plain client of the API server, for what tests do as users, as the kubelet and as Kubernetes' own controllers."""

import base64
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

from slmops.api.keys import API_VERSION
from slmops.cluster.kinds import PLACES

Object = dict[str, Any]
T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T], seconds: float = 20.0) -> T:
    """The first true value of `probe()`; fails naming `what` and the last value after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s; last seen: {value!r}"
        time.sleep(0.05)


@dataclass(frozen=True)
class Access:
    """How to reach an API server, taken from a kubeconfig with embedded certificates."""

    server: str
    folder: Path

    @classmethod
    def read(cls, kubeconfig: Path, folder: Path) -> "Access":
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        for name, text in {
            "ca.crt": cluster["certificate-authority-data"],
            "admin.crt": user["client-certificate-data"],
            "admin.key": user["client-key-data"],
        }.items():
            (folder / name).write_bytes(base64.b64decode(text))
        return cls(cluster["server"], folder)

    def ssl(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        context.load_cert_chain(self.folder / "admin.crt", self.folder / "admin.key")
        return context


class ApiError(Exception):
    """The API server said no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Api:
    """Calls in one namespace. Every call raises ApiError for what is no success."""

    def __init__(self, access: Access, namespace: str = "default") -> None:
        self.access, self.namespace = access, namespace
        self.http = httpx.Client(base_url=access.server, verify=access.ssl(), trust_env=False, timeout=30)

    def ask(
        self, method: str, path: str, body: Any = None, *, content: str = "application/json", **params: str
    ) -> Object:
        headers = {"Content-Type": content, "Accept": params.pop("accept", "application/json")}
        text = None if body is None else json.dumps(body)
        answer = self.http.request(method, path, content=text, headers=headers, params=params)
        found: Object = answer.json()
        if answer.status_code >= 300:
            raise ApiError(answer.status_code, str(found.get("message")))
        return found

    def path(self, kind: str, name: str = "", subresource: str = "") -> str:
        return PLACES[kind].path(self.namespace, name, subresource)

    def create(self, kind: str, name: str, *, dry_run: bool = False, **fields: Any) -> Object:
        place = PLACES[kind]
        version = API_VERSION if place.ours else f"{place.group}/{place.version}".lstrip("/")
        metadata = {"name": name, **fields.pop("metadata", {})}
        params = {"dryRun": "All"} if dry_run else {}
        body = {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}
        return self.ask("POST", self.path(kind), body, fieldManager="user", fieldValidation="Strict", **params)

    def get(self, kind: str, name: str) -> Object | None:
        try:
            return self.ask("GET", self.path(kind, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def need(self, kind: str, name: str) -> Object:
        found = self.get(kind, name)
        assert found is not None, f"{kind} {name} is not there"
        return found

    def list(self, kind: str) -> list[Object]:
        found: list[Object] = self.ask("GET", self.path(kind))["items"]
        return found

    def patch(self, kind: str, name: str, body: Object, subresource: str = "") -> Object:
        return self.ask("PATCH", self.path(kind, name, subresource), body, content="application/merge-patch+json")

    def delete(self, kind: str, name: str) -> None:
        # A Job's default is to orphan its pods, which takes a controller that does not run here.
        self.ask("DELETE", self.path(kind, name), {"propagationPolicy": "Background", "gracePeriodSeconds": 0})

    # What users look at.

    def status(self, kind: str, name: str) -> Object:
        found: Object = (self.get(kind, name) or {}).get("status") or {}
        return found

    def reason(self, kind: str, name: str) -> str:
        """The reason of Ready, or nothing."""
        said = self.status(kind, name).get("conditions") or []
        return next((str(c["reason"]) for c in said if c["type"] == "Ready"), "")

    def until_phase(self, kind: str, name: str, phase: str, seconds: float = 20.0) -> Object:
        wait_for(f"{kind} {name} to be {phase}", lambda: self.status(kind, name).get("phase") == phase, seconds)
        return self.status(kind, name)

    def until_reason(self, kind: str, name: str, reason: str, seconds: float = 20.0) -> Object:
        wait_for(f"{kind} {name} to be {reason}", lambda: self.reason(kind, name) == reason, seconds)
        return self.status(kind, name)
