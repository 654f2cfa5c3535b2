"""Models and data from the Hugging Face Hub or a mirror of it (HF_ENDPOINT). Read only.

We speak the Hub's HTTP API with the same client as the registry: every file is verified, also small ones
(by their Git id), downloads resume, and only files on the allow-list are fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from .download import Wanted, fetch
from .errors import ArtifactError
from .files import Choose, Entry, Progress, Ticker, check_paths, folder_digest
from .formats import FORMAT_ORDER, check_content, classify, detect_format, remedy
from .model import Manifest
from .registry_auth import secret_text
from .staging import Staging
from .transfer import Http, gated
from .trust import trusted
from .uris import HubRef

SOURCE = "dev.slmops.source"
"""Annotation: the URI with the commit in it."""

_HEX40 = re.compile(r"[0-9a-f]{40}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MAX_LISTING = 32 << 20
_MAX_FILE = 1 << 44


class _Snapshot(NamedTuple):
    """A repository at one commit: what we fetch of it."""

    commit: str
    modified: str
    format: str
    files: list[Wanted]


class _HubAuth:
    """A bearer token, for the Hub's own origin only: downloads are redirected to storage elsewhere."""

    def __init__(self, endpoint: httpx.URL, token: str) -> None:
        self._endpoint, self._token = endpoint, token

    def headers(self, url: httpx.URL) -> dict[str, str]:
        """Return the token when `url` is the Hub's."""
        own = (url.scheme, url.host, url.port) == (
            self._endpoint.scheme,
            self._endpoint.host,
            self._endpoint.port,
        )
        return {"Authorization": f"Bearer {self._token}"} if own and self._token else {}

    def challenge(self, response: httpx.Response) -> bool:  # noqa: ARG002 - the protocol has it
        """Give up: the Hub has no second chance."""
        return False


def resolve(ref: HubRef, secret: Mapping[str, Any] | None, patience: float | None) -> str | None:
    """Return the digest of what the revision holds now. Small files have no SHA-256 in the listing: they are read."""
    http = _http(ref, secret, patience)
    snapshot = _snapshot(http, ref)
    if snapshot is None:
        return None
    return folder_digest(Entry(item.path, item.size, item.sha256 or _hash(http, item)) for item in snapshot.files)


def read_manifest(ref: HubRef, secret: Mapping[str, Any] | None, patience: float | None) -> Manifest | None:
    """Return what the Hub says about the revision."""
    http = _http(ref, secret, patience)
    snapshot = _snapshot(http, ref)
    if snapshot is None:
        return None
    entries = [Entry(item.path, item.size, item.sha256 or _hash(http, item)) for item in snapshot.files]
    return _manifest(ref, snapshot, entries)


def pull(
    ref: HubRef,
    dest: Path,
    secret: Mapping[str, Any] | None,
    progress: Progress | None,
    patience: float | None,
    choose: Choose | None = None,
) -> Manifest:
    """Fetch the allowed files of one commit, or those chosen: of the others small ones are read, for the digest."""
    http = _http(ref, secret, patience)
    snapshot = _snapshot(http, ref)
    if snapshot is None:
        raise _absent(ref, http)
    paths = [item.path for item in snapshot.files]
    part = None if choose is None else frozenset(choose(paths))
    chosen = frozenset(paths) if part is None else part
    total = sum(item.size for item in snapshot.files if item.path in chosen)
    ticker = Ticker(total, progress)
    stage = "sha256:" + hashlib.sha256(f"{ref.pinned(snapshot.commit)}".encode()).hexdigest()
    with Staging(dest, stage, part=part) as staging:
        there = staging.published()
        if part is None and there is not None and there.annotations.get(SOURCE) == ref.pinned(snapshot.commit):
            ticker.add(total)
            return there
        staging.reserve(total)
        entries = []
        for item in snapshot.files:
            if item.path not in chosen:
                entries.append(Entry(item.path, item.size, item.sha256 or _hash(http, item)))
                ticker.add(0)  # the caller may want to end it
                continue
            entries.append(fetch(http, item, staging, ticker.add))
            check_content(item.path, staging.existing(item.path) or dest, str(ref))
        manifest = _manifest(ref, snapshot, entries)
        staging.publish(manifest, entries)
    return manifest


def _endpoint() -> httpx.URL:
    try:
        url = httpx.URL((os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/"))
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ArtifactError("BadUri", "HF_ENDPOINT is not an http(s) URL. Write it like https://hub.example.com.")
    return url


def _http(ref: HubRef, secret: Mapping[str, Any] | None, patience: float | None) -> Http:
    token = secret_text(secret, "HF_TOKEN", "token") or os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ArtifactError("AccessDenied", f"{ref}: HF_TOKEN holds characters that no token has. Mend the Secret.")
    return Http(f"{ref} ({_endpoint().host})", _HubAuth(_endpoint(), token), patience, trusted(secret))


def _snapshot(http: Http, ref: HubRef) -> _Snapshot | None:
    """List the revision with sizes and ids, and choose the files."""
    kind, auth = f"{ref.kind}s", http.auth
    reply = http.request(
        "GET",
        f"{_endpoint()}/api/{kind}/{ref.repository}/revision/{quote(ref.revision, safe='')}?blobs=true",
        expect=(200, 401, 404),
        limit=_MAX_LISTING,
    )
    if reply.status == 401 and reply.headers.get("x-error-code") == "GatedRepo":
        raise gated(http.where)
    if reply.status == 401 and auth.headers(_endpoint()) and reply.headers.get("x-error-code") != "RepoNotFound":
        raise ArtifactError(
            "AccessDenied",
            f"{http.where}: the Hub knows no such HF_TOKEN (HTTP 401). It is wrong, expired or revoked: "
            "put a valid one into the Secret.",
        )
    if reply.status in (401, 404):
        return None  # the Hub answers 401 for what does not exist when nobody is signed in
    try:
        document = json.loads(reply.body)
        commit = str(document["sha"])
        listed = {str(item["rfilename"]): item for item in document["siblings"]}
        if not _HEX40.fullmatch(commit):
            raise ValueError
        fmt, chosen = _choose(list(listed), ref)
        base = f"{_endpoint()}/{'datasets/' if ref.kind == 'dataset' else ''}{ref.repository}/resolve/{commit}"
        files = [_wanted(path, listed[path], base) for path in chosen]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise ArtifactError(
            "SourceUnavailable", f"{ref}: {_endpoint().host} did not answer as a Hub does. Check HF_ENDPOINT."
        ) from None
    return _Snapshot(commit, str(document.get("lastModified") or ""), fmt, files)


def _absent(ref: HubRef, http: Http) -> ArtifactError:
    """The Hub says the same of what does not exist and of what the asker may not see."""
    cause = (
        "or the HF_TOKEN in the Secret has no access to it"
        if http.auth.headers(_endpoint())
        else "or it is private and no HF_TOKEN was given: name a Secret that holds one in secretRef"
    )
    return ArtifactError(
        "SourceNotFound", f"{ref} does not exist on {_endpoint().host} (check name and revision), {cause}."
    )


def _choose(paths: list[str], ref: HubRef) -> tuple[str, list[str]]:
    """Choose the allowed files. Of several weight formats one is taken, of several copies the one of transformers."""
    visible = [path for path in paths if not any(part.startswith(".") and part != ".." for part in path.split("/"))]
    every = frozenset(visible)
    verdicts = {path: classify(path, every) for path in visible}
    formats = {verdict.format for verdict in verdicts.values() if verdict.role == "weight"}
    pickled = sorted(path for path, verdict in verdicts.items() if verdict.format == "pickle")
    if ref.kind == "model" and not formats:
        if pickled:
            raise ArtifactError(
                "UnsupportedFormat",
                f"{ref} has pickled weights only ({pickled[0]}), which can run code. {remedy('pickle')}",
            )
        raise ArtifactError("UnsupportedFormat", f"{ref} has no weights in a format that is read. {remedy('')}")
    fmt = next((known for known in FORMAT_ORDER if known in formats), "")
    chosen = sorted(
        path
        for path, verdict in verdicts.items()
        if verdict.role and (verdict.role != "weight" or ref.kind == "dataset" or verdict.format == fmt)
    )
    if fmt == "safetensors":
        chosen = [path for path in chosen if not path.startswith(("original/", "onnx/", "openvino/"))]
        if any(path.startswith("model") for path in chosen):
            chosen = [path for path in chosen if not path.startswith("consolidated")]
    if ref.kind == "dataset":
        fmt = detect_format({path: verdicts[path] for path in chosen})
    if not chosen:
        raise ArtifactError("UnsupportedFormat", f"{ref} holds no file in a format that is read. {remedy('')}")
    check_paths(chosen, str(ref))
    return fmt, chosen


def _wanted(path: str, item: Mapping[str, Any], base: str) -> Wanted:
    sha256 = str((item.get("lfs") or {}).get("sha256") or "")
    git = "" if sha256 else str(item.get("blobId") or "")
    size = item["size"]
    known = _HEX64.fullmatch(sha256) if sha256 else _HEX40.fullmatch(git)
    if not known or not isinstance(size, int) or not 0 <= size <= _MAX_FILE:
        raise ValueError(path)
    return Wanted(path, size, f"{base}/{quote(path)}", sha256, git)


def _hash(http: Http, item: Wanted) -> str:
    """SHA-256 of a small file that the listing knows by its Git id only."""
    reply = http.request("GET", item.url, limit=max(item.size, 1))
    git = hashlib.sha1(b"blob %d\0" % len(reply.body) + reply.body, usedforsecurity=False).hexdigest()
    if git != item.git:
        raise ArtifactError("DigestMismatch", f"{http.where}: {item.path} does not match its id on the Hub. Try again.")
    return hashlib.sha256(reply.body).hexdigest()


def _manifest(ref: HubRef, snapshot: _Snapshot, entries: list[Entry]) -> Manifest:
    return Manifest(
        kind=ref.kind,
        format=snapshot.format,
        digest=folder_digest(entries),
        annotations={
            "name": ref.repository,
            SOURCE: ref.pinned(snapshot.commit),
            "dev.slmops.commit": snapshot.commit,
        },
        created=snapshot.modified,
        size_bytes=sum(entry.size for entry in entries),
    )
