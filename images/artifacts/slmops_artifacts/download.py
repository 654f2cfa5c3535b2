"""One file from an HTTP server to the disk: hashed while it streams, resumed by Range, verified at its end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx

from .errors import ArtifactError, from_os
from .files import CHUNK, PRIVATE, Entry
from .staging import Staging
from .transfer import Http, Patience, retry_after, unreachable

_ATTEMPTS = 2
"""Whole copies that may turn out damaged before we blame the server's file and not the wire."""


class Wanted(NamedTuple):
    """A file to fetch. `sha256` or `git` (the id of a Git blob) must be known, both hexadecimal."""

    path: str
    size: int
    url: str
    sha256: str = ""
    git: str = ""


class _Sink:
    """A partial file and the running hashes of what it holds."""

    def __init__(self, part: Path, wanted: Wanted, on_bytes: Callable[[int], None], patience: Patience) -> None:
        self.part, self._wanted, self._on_bytes = part, wanted, on_bytes
        self._patience, self._best = patience, 0
        self._start()
        if part.is_file() and not part.is_symlink():
            self._continue()

    def _start(self) -> None:
        self.have = 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % self._wanted.size, usedforsecurity=False)

    def _continue(self) -> None:
        with self.part.open("rb") as stream:
            while block := stream.read(CHUNK):
                self._count(block)

    def _count(self, block: bytes) -> None:
        self.have += len(block)
        self._sha256.update(block)
        if self._wanted.git:
            self._git.update(block)
        if self.have > self._best:  # bytes that come a second time are no progress
            self._best = self.have
            self._patience.progressed()
        self._on_bytes(len(block))

    def reset(self) -> None:
        """Start over with an empty file."""
        self._on_bytes(-self.have)
        self.part.unlink(missing_ok=True)
        self._start()

    def save(self, response: httpx.Response) -> None:
        """Append the body, but never beyond one byte more than was announced."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(self.part, flags, 0o644), "wb") as stream:
            try:
                for block in response.iter_raw(CHUNK):
                    block = block[: self._wanted.size - self.have + 1]
                    stream.write(block)
                    self._count(block)
                    if self.have > self._wanted.size:
                        break
            finally:
                stream.flush()
            os.fsync(stream.fileno())

    def complaint(self) -> str:
        """Tell what is wrong with the whole file; empty when it is what was wanted."""
        if self.have != self._wanted.size:
            return f"does not have the {self._wanted.size} bytes that were announced"
        for found, expected in (
            (self.sha256, self._wanted.sha256),
            (self._git.hexdigest(), self._wanted.git),
        ):
            if expected and found != expected:
                return f"has the digest {found[:12]}… instead of {expected[:12]}…"
        return ""

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def fetch(http: Http, wanted: Wanted, staging: Staging, on_bytes: Callable[[int], None]) -> Entry:
    """Bring one file into the staging folder, keeping what an earlier run has left there."""
    name = hashlib.sha256(wanted.path.encode()).hexdigest()[:16]
    part = staging.folder / f"{PRIVATE}part-{name}"
    try:
        if (found := staging.existing(wanted.path)) is not None:
            kept = _Sink(found, wanted, on_bytes, http.patience())
            if not kept.complaint():
                return Entry(wanted.path, kept.have, kept.sha256)
            kept.reset()
        patience = http.patience()
        sink = _Sink(part, wanted, on_bytes, patience)
        _fill(http, wanted, sink, patience)
        part.replace(staging.target(wanted.path))
    except OSError as error:
        raise from_os(error, "Writing to", staging.dest) from error
    return Entry(wanted.path, sink.have, sink.sha256)


def _fill(http: Http, wanted: Wanted, sink: _Sink, patience: Patience) -> None:
    """Ask for the missing bytes until the file is whole and right."""
    damaged = 0
    while True:
        failure, hint = None, 0.0
        if sink.have < wanted.size or not sink.part.exists():
            failure, hint = _attempt(http, wanted, sink)
        if failure is not None:
            patience.wait(failure, hint)
            continue
        complaint = sink.complaint()
        if not complaint:
            return
        damaged += 1
        sink.reset()
        if damaged >= _ATTEMPTS:
            raise ArtifactError(
                "DigestMismatch",
                f"{http.where}: {wanted.path} {complaint}. The copy there is damaged: publish it again.",
            )


def _attempt(http: Http, wanted: Wanted, sink: _Sink) -> tuple[ArtifactError | None, float]:
    """One request for the rest of the file. Returns why it stopped early, and the server's Retry-After."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={sink.have}-"} if sink.have else {})
    try:
        response = http.send("GET", wanted.url, headers)
        try:
            if response.status_code == 416:
                sink.reset()
            elif response.status_code not in (200, 206):
                return http.failure(response), retry_after(response)
            else:
                resumed = response.headers.get("content-range", "").startswith(f"bytes {sink.have}-")
                if sink.have and not (response.status_code == 206 and resumed):
                    sink.reset()
                sink.save(response)
        finally:
            response.close()
    except httpx.HTTPError as error:
        return unreachable(error, http.where), 0.0
    except ArtifactError as error:
        return error, 0.0
    return None, 0.0
