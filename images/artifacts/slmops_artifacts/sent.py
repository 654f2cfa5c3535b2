"""What a process that pushes to one URI time and again knows from last time: then a push costs what is new."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import from_os
from .files import Entry, hash_file

_TICK = 20_000_000
"""Nanoseconds. A file that was written twice within one tick of the file system's clock does not show it."""

_Look = tuple[int, int, int]


class Sent:
    """One for each URI; a fresh one knows nothing, and the push does all there is to do.

    blobs  SHA-256 of what the manifest names that the registry took last, and so holds on to
    """

    def __init__(self) -> None:
        self.blobs: frozenset[str] = frozenset()
        self._hashes: dict[Path, tuple[_Look, Entry]] = {}
        self._copies: dict[str, tuple[_Look, Entry]] = {}

    def entries(self, files: Mapping[str, Path]) -> list[Entry]:
        """The files by relative path, in its order; only what changed is read. Raises ArtifactError."""
        known, self._hashes = self._hashes, {}
        return [self._entry(path, file, known.get(file)) for path, file in sorted(files.items())]

    def _entry(self, path: str, file: Path, known: tuple[_Look, Entry] | None) -> Entry:
        try:
            look = _look(file)
        except OSError as error:
            raise from_os(error, "Reading", file) from error
        if known is None or known[0] != look:
            began = time.time_ns()
            known = (look, hash_file(file))
            if began - look[2] < _TICK:
                return known[1]._replace(path=path)
        self._hashes[file] = known
        return known[1]._replace(path=path)

    def copied(self, folder: Path, entries: Iterable[Entry]) -> None:
        """Remember that `folder` holds these files as this process has written them."""
        self._copies = {}
        with contextlib.suppress(OSError):  # what is not remembered is copied again
            self._copies = {entry.path: (_look(folder / entry.path), entry) for entry in entries}

    def holds(self, entry: Entry, folder: Path) -> bool:
        """Whether the file in `folder` is the one that this process has written."""
        known = self._copies.get(entry.path)
        try:
            return known is not None and known == (_look(folder / entry.path), entry)
        except OSError:
            return False

    def link(self, entry: Entry, folder: Path, target: Path) -> bool:
        """Give the copy in `folder` another name instead of copying once more. False where there is none, or no way."""
        if not self.holds(entry, folder):
            return False
        try:
            os.link(folder / entry.path, target, follow_symlinks=False)
        except OSError:
            return False
        return True


def _look(file: Path) -> _Look:
    """What tells a file from the one that was there before."""
    status = file.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns
