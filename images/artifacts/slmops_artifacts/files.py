"""Files on disk: listing without following links, hashing, safe names, and the digest of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import ArtifactError, from_os
from .formats import FOLDER_MANIFEST, MARKER, MAX_FILES

CHUNK = 1 << 20
PRIVATE = ".slmops-"
"""Files and folders with this prefix are ours: never part of an artifact."""

Progress = Callable[[int, int], None]
Choose = Callable[[Sequence[str]], Sequence[str]]
"""Which of an artifact's files are wanted. It may raise: nothing has been fetched by then."""


class Entry(NamedTuple):
    """One file of an artifact. The path is relative, with forward slashes."""

    path: str
    size: int
    sha256: str


class Ticker:
    """Adds up bytes of many files and tells the caller's progress function."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self._progress = progress

    def add(self, count: int) -> None:
        """Count `count` more bytes (negative when a transfer starts over)."""
        self.done = max(0, self.done + count)
        if self._progress is not None:
            self._progress(min(self.done, self.total), self.total)


def safe_path(path: str, where: str) -> str:
    """Return `path` if it is a plain relative path; refuse everything that could land outside the folder."""
    parts = path.split("/")
    odd = (
        not path
        or len(path.encode("utf-8", "surrogatepass")) > 1024
        or any(part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
        or any(not char.isprintable() for char in path)
        or any(part.startswith(PRIVATE) for part in parts)
        or path == FOLDER_MANIFEST
    )
    if odd:
        raise ArtifactError(
            "UnsupportedFormat",
            f"{where} holds a file with a name that is not allowed: {path[:120]!a}. "
            "Names must be relative, printable, without '..', and at most 255 bytes per part.",
        )
    return path


def check_paths(paths: Sequence[str], where: str) -> None:
    """Refuse unsafe names, names that occur twice, and a name that is both a file and a folder."""
    known = {safe_path(path, where) for path in paths}
    if len(paths) > MAX_FILES:
        raise ArtifactError("UnsupportedFormat", f"{where} lists {len(paths)} files; at most {MAX_FILES} are allowed.")
    clash = len(known) != len(paths) or any(
        "/".join(path.split("/")[:depth]) in known for path in known for depth in range(1, path.count("/") + 1)
    )
    if clash:
        raise ArtifactError("UnsupportedFormat", f"{where} lists one file name twice. Publish it again.")


def list_files(source: Path, where: str) -> dict[str, Path]:
    """All files of an artifact on disk, by relative path. Hidden files are left out; links are refused."""
    try:
        mode = source.lstat().st_mode
        if stat.S_ISREG(mode):
            return {safe_path(source.name, where): source}
        if stat.S_ISLNK(mode) and not source.exists():
            raise ArtifactError("SourceNotFound", f"{where} is a link that leads nowhere. Check the path.")
        found = dict(_walk(source, "", where))
    except OSError as error:
        raise from_os(error, "Reading", where) from error
    check_paths(list(found), where)
    return found


def _walk(folder: Path, prefix: str, where: str) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda entry: entry.name):
            if item.name.startswith(".") or item.name == "lost+found":
                continue
            path = f"{prefix}{item.name}"
            if path == FOLDER_MANIFEST:
                continue
            if item.is_symlink():
                raise ArtifactError(
                    "UnsupportedFormat",
                    f"{where}: {path!a} is a symbolic link. Copy the file itself in its place.",
                )
            if item.is_dir(follow_symlinks=False):
                yield from _walk(Path(item.path), f"{path}/", where)
            elif item.is_file(follow_symlinks=False):
                yield path, Path(item.path)
            else:
                raise ArtifactError("UnsupportedFormat", f"{where}: {path!a} is not an ordinary file. Remove it.")


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> Entry:
    """Size and SHA-256 of one file; the path in the result is the file's own name."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(CHUNK):
                digest.update(block)
                size += len(block)
                if on_bytes is not None:
                    on_bytes(len(block))
    except OSError as error:
        raise from_os(error, "Reading", path) from error
    return Entry(path.name, size, digest.hexdigest())


def folder_digest(entries: Iterable[Entry]) -> str:
    """Identity of a set of files: paths, contents and sizes, whatever the order and the store."""
    rows = [[entry.path, entry.sha256, entry.size] for entry in sorted(entries)]
    return "sha256:" + hashlib.sha256(canonical(rows)).hexdigest()


def canonical(value: object) -> bytes:
    """JSON with one spelling only, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_ours(name: str) -> bool:
    """Tell the marker, the manifest and staging folders from the files of an artifact."""
    return name.startswith(PRIVATE) or name in (MARKER, FOLDER_MANIFEST)
