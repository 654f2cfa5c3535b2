"""A folder that becomes visible whole or not at all, and that a killed writer can continue.

Files are written to a staging folder whose name holds the digest, under a lock that dies with its process.
Publishing is one rename; into a folder that already exists (a mount) the files move in and a marker comes last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from pydantic import ValidationError

from .errors import ArtifactError, disk_full, from_os
from .files import PRIVATE, Entry, canonical, fsync_path, is_ours, safe_path
from .formats import FOLDER_MANIFEST, MARKER
from .model import Manifest

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_TAIL = re.compile(r"[0-9a-f]{16}(\..*)?")
_MAX_MARKER = 16 << 20


class Installed(NamedTuple):
    """What a folder that we published says about itself."""

    manifest: Manifest
    files: tuple[Entry, ...]


def installed(folder: Path) -> Installed | None:
    """Read our marker in `folder`, and check that every file it names is there with its size.

    A writer may put another folder in its place meanwhile: the marker of one and the files of the other tell nothing.
    Raises ArtifactError where the volume does not let it be told.
    """
    while True:
        before = _identity(folder)
        try:
            found = _read_installed(folder)
        except OSError as error:
            if _identity(folder) == before:
                raise from_os(error, "Reading", folder) from error
            continue
        if found is not None or _identity(folder) == before:
            return found


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from one of the same name before it; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _read_installed(folder: Path) -> Installed | None:
    for found in _markers(folder):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if all((folder / row.path).lstat().st_size == row.size for row in found.files):
                return found
    return None


def _markers(folder: Path) -> Iterator[Installed]:
    """What our markers in `folder` say, whether or not their files are there. Raises OSError."""
    for name in (FOLDER_MANIFEST, MARKER):
        try:
            with (folder / name).open("rb") as stream:
                document = json.loads(stream.read(_MAX_MARKER))
            rows = [Entry(safe_path(row[0], str(folder)), int(row[1]), str(row[2])) for row in document["files"]]
            manifest = Manifest.model_validate(document["manifest"])
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        except (ValueError, KeyError, TypeError, IndexError, ValidationError, ArtifactError):
            continue
        yield Installed(manifest, tuple(rows))


def foreign(folder: Path) -> str:
    """A file below `folder` that is no part of an artifact of ours there, whole or not; empty if there is none.

    Hidden names and lost+found are nobody's, as everywhere (see files.list_files). Raises ArtifactError.
    """
    while True:
        before = _identity(folder)
        try:
            ours = {
                path for found in _markers(folder) for path in (FOLDER_MANIFEST, *(row.path for row in found.files))
            }
            first = next((path for path in _paths(folder, "") if path not in ours), "")
        except FileNotFoundError:
            if _identity(folder) is None:
                return ""
            continue
        except OSError as error:
            raise from_os(error, "Reading", folder) from error
        if not first or _identity(folder) == before:  # else the marker may be of the folder that was there before
            return first


def _paths(folder: Path, prefix: str) -> Iterator[str]:
    """All below `folder` that is no folder itself, links too."""
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda entry: entry.name):
            if item.name.startswith(".") or item.name == "lost+found":
                continue
            if item.is_dir(follow_symlinks=False):
                yield from _paths(Path(item.path), f"{prefix}{item.name}/")
            else:
                yield f"{prefix}{item.name}"


def illegible(folder: Path) -> bool:
    """Whether `folder` has a manifest of ours that says nothing, such as one that was cut. Raises OSError."""
    return (folder / FOLDER_MANIFEST).is_file() and not any(True for _ in _markers(folder))


def check_vacant(dest: Path, name: str) -> None:
    """Refuse a folder that cannot be replaced without taking away what is not ours."""
    if os.path.lexists(dest) and not dest.is_dir():
        raise ArtifactError("Refused", f"{name} is a file. Remove it, or choose an empty folder in its place.")
    found = foreign(dest)
    if found:
        raise ArtifactError(
            "Refused",
            f"{name} holds {found[:200]!a}, which is not a part of an artifact of ours. Move it away, "
            "or choose an empty folder.",
        )


def discard(folder: Path, digest: str) -> None:
    """Remove a folder that we published: renamed first, under a name that the next writer there sweeps away."""
    spare = folder.with_name(f"{_private_name(folder)}{_tag(digest)}.gone-{secrets.token_hex(4)}")
    try:
        folder.rename(spare)
        fsync_path(folder.parent)
        shutil.rmtree(spare)
    except OSError as error:
        raise from_os(error, "Removing", folder) from error


class Staging:
    """The writer's side. Use as a context manager: entering waits for other writers of the same content.

    `part`: some files of the artifact `digest` only, which nobody takes for the whole or for another part.
    """

    def __init__(self, dest: Path, digest: str, marker: str = MARKER, part: frozenset[str] | None = None) -> None:
        self.dest = dest
        if part is not None:
            digest = "sha256:" + hashlib.sha256(canonical([digest, *sorted(part)])).hexdigest()
        self.digest = digest
        self._part = part
        self._marker = marker
        self._in_place = marker == MARKER and dest.exists()
        self._base = dest if self._in_place else dest.parent
        self._prefix = f"{PRIVATE}staging-" if self._in_place else _private_name(dest)
        self.folder = self._base / f"{self._prefix}{_tag(digest)}"
        self._lock = -1

    def __enter__(self) -> Staging:
        try:
            self._refuse_foreign()
            self._base.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._acquire()
        except OSError as error:
            raise from_os(error, "Writing to", self.dest) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            hopeless = isinstance(error, ArtifactError) and error.reason in ("DiskFull", "UnsupportedFormat")
            if (error is None or hopeless) and self._still_ours():
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            os.close(self._lock)

    def published(self) -> Manifest | None:
        """Return the manifest of what is at the destination now (perhaps since we waited for the lock)."""
        there = installed(self.dest)
        return there.manifest if there is not None else None

    def done(self) -> Manifest | None:
        """Return the manifest when this very content is already published."""
        there = self.published()
        return there if there is not None and there.digest == self.digest else None

    def reserve(self, size: int) -> None:
        """Fail before the first byte when the volume cannot hold what is still missing."""
        have = sum(item.stat().st_size for item in self.folder.rglob("*") if item.is_file())
        free = shutil.disk_usage(self.folder).free
        if size - have > free:
            need = f"needs {_mib(size - have)}, {_mib(free)} are free"
            raise disk_full(f"Writing to {self.dest}: no space left on the volume ({need})")

    def target(self, path: str) -> Path:
        """Where to write the file `path`."""
        target = self.folder / safe_path(path, str(self.dest))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os(error, "Writing to", self.dest) from error
        return target

    def existing(self, path: str) -> Path | None:
        """Return the file `path` if an earlier run of ours, killed before its end, has left it complete."""
        for folder in (self.folder, self.dest) if self._in_place else (self.folder,):
            found = folder / path
            if found.is_file() and not found.is_symlink():
                return found
        return None

    def publish(self, manifest: Manifest, entries: Sequence[Entry]) -> None:
        """Make the folder visible with exactly these files, or with a part of them: it then does not say more."""
        if self._part is not None:
            manifest = Manifest(kind=manifest.kind, digest=self.digest)
            entries = [entry for entry in entries if entry.path in self._part]
        try:
            self._write_marker(manifest, entries)
            if self._in_place:
                self._move_in(entries)
            else:
                self._rename()
        except OSError as error:
            raise from_os(error, "Writing to", self.dest) from error

    def _write_marker(self, manifest: Manifest, entries: Sequence[Entry]) -> None:
        for leftover in self.folder.glob(f"{PRIVATE}part-*"):
            leftover.unlink()
        document = {"manifest": manifest.model_dump(mode="json"), "files": [list(entry) for entry in entries]}
        marker = self.folder / self._marker
        with marker.open("w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=1, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        for folder in {self.folder, *((self.folder / entry.path).parent for entry in entries)}:
            if folder.is_dir():
                fsync_path(folder)

    def _rename(self) -> None:
        """Put the staging folder in the place of `dest`; an older artifact of ours there goes away."""
        for _ in range(20):
            try:
                self.folder.rename(self.dest)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            # Who pushes has found another manifest there, or a damaged file.
            if self._marker == MARKER and self.done() is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            self._refuse_foreign()
            self._swap()
            break
        else:
            raise ArtifactError("SourceUnavailable", f"{self.dest} is being written by others. Try again.")
        fsync_path(self._base)

    def _swap(self) -> None:
        """Trade places with the older artifact, under a name that no waiting writer takes for its own."""
        spare = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(4)}")
        self.folder.rename(spare)
        if not _exchange(spare, self.dest):
            old = spare.with_name(f"{spare.name}.old")
            with contextlib.suppress(FileNotFoundError):
                self.dest.rename(old)
            spare.rename(self.dest)
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(spare, ignore_errors=True)

    def _move_in(self, entries: Sequence[Entry]) -> None:
        """Fill an existing folder: the marker goes first when it is old, and comes last when it is new."""
        before = installed(self.dest)
        (self.dest / MARKER).unlink(missing_ok=True)
        keep = {entry.path for entry in entries}
        for entry in before.files if before else ():
            if entry.path not in keep:
                (self.dest / entry.path).unlink(missing_ok=True)
        for entry in entries:
            target = self.dest / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if (self.folder / entry.path).exists():
                (self.folder / entry.path).replace(target)
        for folder in {(self.dest / entry.path).parent for entry in entries}:
            fsync_path(folder)
        (self.folder / self._marker).replace(self.dest / MARKER)
        fsync_path(self.dest)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        """Never replace or mix with files that somebody else put there."""
        if not self._in_place:
            check_vacant(self.dest, str(self.dest))
            return
        before = _identity(self.dest)
        if before is None or installed(self.dest) is not None:
            return
        if not self.dest.is_dir():
            raise ArtifactError("BadUri", f"{self.dest} is a file. Choose an empty folder as the destination.")
        found = [item.name for item in self.dest.iterdir()]
        names = [name for name in found if name != "lost+found" and not name.startswith(".")]
        interrupted = any(is_ours(name) for name in found)
        if names and not interrupted and _identity(self.dest) == before:
            raise ArtifactError(
                "BadUri",
                f"{self.dest} already holds files that are not an artifact of ours. Choose an empty folder.",
            )

    def _acquire(self) -> None:
        """Take the lock of the staging folder; if it was published while we waited, start a new one."""
        while True:
            with contextlib.suppress(FileExistsError):  # as mkdir itself says where the folder goes between two looks
                self.folder.mkdir(exist_ok=True)
            try:
                handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            if not _try_lock(handle):
                os.close(handle)
                time.sleep(0.1)
                continue
            self._lock = handle
            if self._still_ours():
                return
            os.close(handle)

    def _still_ours(self) -> bool:
        """Tell whether the staging folder's name still means the folder that we hold the lock of."""
        try:
            return self.folder.lstat().st_ino == os.fstat(self._lock).st_ino
        except FileNotFoundError:
            return False

    def _sweep(self) -> None:
        """Remove what killed writers of other contents have left, unless they are alive."""
        for old in self._base.glob(f"{self._prefix}*"):
            tail = old.name.removeprefix(self._prefix)
            if old == self.folder or not _TAIL.fullmatch(tail) or not old.is_dir() or old.is_symlink():
                continue
            try:
                handle = os.open(old, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # its writer has just published it
            try:
                if _try_lock(handle):
                    shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(handle)


def _private_name(dest: Path) -> str:
    """How the names begin that we use beside `dest`."""
    return f"{PRIVATE}{dest.name[:180]}-"


def _tag(digest: str) -> str:
    return digest.removeprefix("sha256:")[:16]


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks: then renames alone keep the content whole.
        return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
