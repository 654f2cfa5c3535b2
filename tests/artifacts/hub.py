"""A small, faithful server of the Hugging Face Hub's HTTP API, for tests without the network.

    python tests/artifacts/hub.py --port 8090 --root DIR      # DIR/org/name/... and DIR/datasets/org/name/...

Serves what clients use to read: repository info with `blobs=true`, file trees, HEAD and GET of files with ETag,
X-Repo-Commit, X-Linked-Etag and Range, redirects of large files to another origin (as the Hub's storage does),
and the errors with X-Error-Code. Faults can be injected: see the attributes of `Hub`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".data", ".gguf", ".parquet", ".model", ".pt")


class Repository:
    """One model or dataset repository at one commit."""

    def __init__(self, kind: str, name: str, files: dict[str, bytes]) -> None:
        self.kind, self.name, self.files = kind, name, files
        rows = [(path, hashlib.sha256(content).hexdigest()) for path, content in sorted(files.items())]
        self.commit = hashlib.sha1(json.dumps([kind, name, rows]).encode()).hexdigest()
        self.private = False
        self.gated = False

    def lfs(self, path: str) -> bool:
        return path.endswith(LFS_SUFFIXES)

    def git_id(self, path: str) -> str:
        content = self.files[path]
        if self.lfs(path):
            oid = hashlib.sha256(content).hexdigest()
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
            content = text.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def etag(self, path: str) -> str:
        return hashlib.sha256(self.files[path]).hexdigest() if self.lfs(path) else self.git_id(path)

    def sibling(self, path: str, blobs: bool) -> dict[str, Any]:
        if not blobs:
            return {"rfilename": path}
        item: dict[str, Any] = {"rfilename": path, "blobId": self.git_id(path), "size": len(self.files[path])}
        if self.lfs(path):
            item["lfs"] = {"sha256": self.etag(path), "size": item["size"], "pointerSize": 134}
        return item

    def info(self, blobs: bool) -> dict[str, Any]:
        return {
            "_id": self.commit[:24],
            "id": self.name,
            **({"modelId": self.name} if self.kind == "model" else {}),
            "sha": self.commit,
            "lastModified": "2026-01-02T03:04:05.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [self.sibling(path, blobs) for path in sorted(self.files)],
        }

    def tree(self) -> list[dict[str, Any]]:
        rows = []
        for path in sorted(self.files):
            row = self.sibling(path, True)
            entry = {"type": "file", "oid": row["blobId"], "size": row["size"], "path": path}
            if "lfs" in row:
                entry["lfs"] = {"oid": row["lfs"]["sha256"], "size": row["size"], "pointerSize": 134}
            rows.append(entry)
        return rows


class Hub:
    """The server, and a second origin for large files. Use as a context manager."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.token = "hf_good"  # opens private and gated repositories
        self.revoked = ""  # a token that the Hub does not know, which opens not even public ones
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.busy = 0  # answer 503 that often
        self.cut_after = 0  # close the connection after so many bytes of a body ...
        self.cuts = 0  # ... that often
        self.stalls = 0  # ... or say nothing more, that often, after so many bytes; `released` ends it
        self.released = threading.Event()
        self.corrupt: set[str] = set()  # paths whose content is damaged, with the right size
        self.ranges = True
        self._servers = [self._serve(host, port, "hub"), self._serve(host, 0, "storage")]
        self.url, self.storage_url = (f"http://{host}:{server.server_address[1]}" for server in self._servers)

    def add(self, name: str, files: dict[str, bytes], kind: str = "model") -> Repository:
        repository = Repository(kind, name, files)
        self.repositories[kind, name] = repository
        return repository

    def gets(self) -> Counter[str]:
        """How often each path was fetched."""
        return Counter(path for method, path, _ in self.requests if method == "GET")

    def _serve(self, host: str, port: int, role: str) -> ThreadingHTTPServer:
        hub = self
        handler = type("Handler", (_Handler,), {"hub": hub, "role": role})
        server = ThreadingHTTPServer((host, port), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def close(self) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    role: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class names it so
        """Stay silent."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        hub.requests.append((self.command, self.path, dict(self.headers.items())))
        if hub.busy > 0:
            hub.busy -= 1
            self._error(503, "", "Busy", {"Retry-After": "0"})
            return
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = parse_qs(url.query)
        if self.role == "storage":
            kind, org, name = parts[:3]
            self._file(hub.repositories[kind, f"{org}/{name}"], "/".join(parts[3:]), body)
        elif parts[0] == "api":
            self._api(parts[1:], query)
        else:
            self._resolve(parts, body)

    def _find(self, kind: str, name: str, revision: str) -> Repository | None:
        """The repository, after the Hub's checks; errors are answered here."""
        repository = self.hub.repositories.get((kind, name))
        trusted = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.revoked and self.headers.get("Authorization") == f"Bearer {self.hub.revoked}":
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        if repository is None or (repository.private and not trusted):
            if "Authorization" in self.headers:
                self._error(404, "RepoNotFound", "Repository not found")
            else:
                self._error(401, "RepoNotFound", "Invalid username or password.")
            return None
        if revision not in ("main", repository.commit, repository.commit[:7]):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository

    def _gated(self, repository: Repository) -> bool:
        if repository.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            code = 403 if "Authorization" in self.headers else 401
            self._error(code, "GatedRepo", "Access to this repository is restricted.")
            return True
        return False

    def _api(self, parts: list[str], query: dict[str, list[str]]) -> None:
        kind = {"models": "model", "datasets": "dataset"}.get(parts[0], "")
        if not kind or len(parts) < 3:
            self._error(404, "", "Not found")
            return
        verb = parts[3] if len(parts) > 3 else ""
        revision = parts[4] if len(parts) > 4 else "main"
        repository = self._find(kind, "/".join(parts[1:3]), revision)
        if repository is None:
            return
        if verb == "tree":
            self._json(200, repository.tree())
        elif verb in ("", "revision"):
            self._json(200, repository.info("blobs" in query))
        else:
            self._error(404, "", "Not found")

    def _resolve(self, parts: list[str], body: bool) -> None:
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[1:] if kind == "dataset" else parts
        if len(parts) < 5 or parts[2] != "resolve":
            self._error(404, "", "Not found")
            return
        repository = self._find(kind, "/".join(parts[:2]), parts[3])
        if repository is None or self._gated(repository):
            return
        path = "/".join(parts[4:])
        if path not in repository.files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
        elif repository.lfs(path):
            self._start(302)
            self.send_header("Location", f"{self.hub.storage_url}/{kind}/{repository.name}/{path}?X-Signature=abc")
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("X-Linked-Size", str(len(repository.files[path])))
            self.send_header("X-Linked-ETag", f'"{repository.etag(path)}"')
            self._end(b"")
        else:
            self._file(repository, path, body)

    def _file(self, repository: Repository, path: str, body: bool) -> None:
        content = repository.files[path]
        if path in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, end = 0, len(content)
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if asked and self.hub.ranges:
            first, _, last = asked.partition("-")
            start, end = int(first), (int(last) + 1 if last else end)
            if start >= len(content):
                self._start(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self._end(b"")
                return
        self._start(206 if asked and self.hub.ranges else 200)
        if asked and self.hub.ranges:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{repository.etag(path)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self._end(content[start:end], body)

    def _error(self, code: int, name: str, message: str, headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Code": name, "X-Error-Message": message} if name else {}
        self._json(code, {"error": message}, {**extra, **(headers or {})})

    def _json(self, code: int, document: object, headers: dict[str, str] | None = None) -> None:
        self._start(code)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self._end(json.dumps(document).encode(), self.command == "GET")

    def _start(self, code: int) -> None:
        self.send_response(code)

    def _end(self, body: bytes, send: bool = True) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not send:
            return
        hub = self.hub
        if hub.stalls > 0 and len(body) > hub.cut_after:
            hub.stalls -= 1
            self.wfile.write(body[: hub.cut_after])
            self.wfile.flush()
            hub.released.wait()
            self.close_connection = True
            return
        if hub.cuts > 0 and len(body) > hub.cut_after:
            hub.cuts -= 1
            self.wfile.write(body[: hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)


def load(hub: Hub, root: Path) -> None:
    """Add every repository below `root`: org/name for models, datasets/org/name for datasets."""
    for kind, base in (("model", root), ("dataset", root / "datasets")):
        for folder in sorted(base.glob("*/*")):
            if folder.is_dir() and not (kind == "model" and folder.parent.name == "datasets"):
                files = {
                    str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
                }
                hub.add(str(folder.relative_to(base)), files, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--root", type=Path, required=True)
    args = parser.parse_args()
    with Hub(args.port, args.host) as hub:
        load(hub, args.root)
        print(f"Serving {len(hub.repositories)} repositories: HF_ENDPOINT={hub.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
