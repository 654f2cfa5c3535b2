"""What the artifact tests share: a real registry, folders with files, and the command line in a process."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops_artifacts import transfer, upload
from slmops_artifacts.files import Entry, Ticker

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Registry:
    """One docker-registry process with its storage in a folder."""

    def __init__(
        self,
        folder: Path,
        htpasswd: Path | None = None,
        storage: Path | None = None,
        deletes: bool = True,
        tls: Path | None = None,
    ) -> None:
        self.folder = folder
        self.storage = storage or folder / "storage"
        self.storage.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {htpasswd}\n" if htpasswd else ""
        http = f"  tls:\n    certificate: {tls}/server.crt\n    key: {tls}/server.key\n" if tls else ""
        self.config = folder / "config.yml"
        self.config.write_text(
            f"version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {self.storage}\n"
            f"  delete:\n    enabled: {str(deletes).lower()}\nhttp:\n  addr: {self.host}\n  secret: tests\n{http}{auth}"
        )

    def command(self) -> tuple[list[str], dict[str, str]]:
        return ["docker-registry", "serve", str(self.config)], {}

    def start(self) -> None:
        command, env = self.command()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)
        end = time.monotonic() + 30  # and no number of tries: some tests let time.sleep take no time
        while time.monotonic() < end:
            try:
                httpx.get(f"http://{self.host}/v2/", trust_env=False)
            except httpx.HTTPError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def blob(self, sha256: str) -> Path:
        """The file in which the registry keeps a blob."""
        return self.storage / "docker/registry/v2/blobs/sha256" / sha256[:2] / sha256 / "data"

    def log(self) -> str:
        return (self.folder / "log").read_text()


def safetensors(size: int = 64, fill: bytes = b"\1") -> bytes:
    """A real safetensors file with one tensor of `size` bytes."""
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + (fill * (size // len(fill) + 1))[:size]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The artifact's files in a folder, without ours."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".slmops") and file.name != "slmops-manifest.json"
    }


@contextlib.contextmanager
def failing(folder: Path, number: int) -> Iterator[None]:
    """A volume that answers with this error wherever somebody looks at the folder or below it."""

    def refused(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            if isinstance(path, str | Path) and Path(path).is_relative_to(folder):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *more, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "stat"), (os, "lstat"), (os, "scandir"), (io, "open")):
            patch.setattr(module, name, refused(getattr(module, name)))
        yield


def growing(folder: Path, pattern: str) -> dict[Path, int]:
    """The files below a folder that somebody writes to right now, with their bytes: what goes in between is left out
    (`Path.rglob` fails on a folder that goes while it is read).
    """
    found = {}
    for parent, _, names in os.walk(folder):
        for file in (Path(parent, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if file.match(pattern):
                    found[file] = file.stat().st_size
    return found


def run_cli(*args: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    path = str(ROOT / "images" / "artifacts")
    return subprocess.Popen(
        [sys.executable, "-m", "slmops_artifacts", *args],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


class Nobody:
    """No credentials."""

    def headers(self, url: httpx.URL) -> dict[str, str]:
        return {}

    def challenge(self, response: httpx.Response) -> bool:
        return False


def stand_in(answer: Callable[[httpx.Request], httpx.Response], patience: float = 300) -> transfer.Http:
    """A client of a registry that answers so."""
    http = transfer.Http("oci://registry/a:v1", Nobody(), patience)
    http.client = httpx.Client(transport=httpx.MockTransport(answer), timeout=http.client.timeout)
    return http


def uploaded(answer: Callable[[httpx.Request], httpx.Response], size: int = 3000, patience: float = 300) -> None:
    """Upload so many bytes to a registry that answers so."""
    send(stand_in(answer, patience), size)


def send(http: transfer.Http, size: int = 3000) -> None:
    """Upload so many bytes."""
    entry = Entry("w", size, "a" * 64)
    base = httpx.URL("https://registry/v2/a/")
    upload.upload(http, base, entry, lambda start, end: iter([bytes(end - start)]), Ticker(size, None))
