"""Artifacts in a folder: on a mounted claim (pvc://) or anywhere on this machine (file://)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import ArtifactError, from_os
from .files import CHUNK, Choose, Entry, Progress, Ticker, folder_digest, hash_file, list_files
from .formats import FOLDER_MANIFEST, check_content, check_files, detect_format
from .model import Manifest
from .sent import Sent
from .staging import Installed, Staging, check_vacant, discard, foreign, illegible, installed
from .uris import FolderRef

_READS = 3
"""How often a folder may be replaced under our hands before we give up."""


def resolve(ref: FolderRef) -> str | None:
    """Return the digest of the folder now: from its manifest, else by reading every file."""
    manifest = read_manifest(ref)
    return manifest.digest if manifest else None


def read_manifest(ref: FolderRef) -> Manifest | None:
    """Return the manifest in the folder; a folder that people have filled by hand gets one made from its files."""
    _check_root(ref)
    there = installed(ref.path)
    if there is not None:
        return there.manifest
    if not os.path.lexists(ref.path):
        return None
    files = list_files(ref.path, str(ref))
    entries = [hash_file(file)._replace(path=path) for path, file in sorted(files.items())]
    return _describe(entries, str(ref))


def pull(ref: FolderRef, dest: Path, progress: Progress | None, choose: Choose | None = None) -> Manifest:
    """Copy the folder, or the files chosen of it, to `dest`; all files are hashed on the way."""
    for attempt in range(_READS):
        _check_root(ref)
        there = installed(ref.path)
        try:
            return _copy_out(ref, dest, there, progress, choose)
        except ArtifactError as error:
            now = installed(ref.path)
            moved = now is not None and (there is None or now.manifest.digest != there.manifest.digest)
            if not moved or attempt == _READS - 1 or error.reason not in ("SourceNotFound", "DigestMismatch"):
                raise
    raise AssertionError("the loop above returns or raises")


def _copy_out(
    ref: FolderRef, dest: Path, there: Installed | None, progress: Progress | None, choose: Choose | None
) -> Manifest:
    known = there.manifest if there else None
    if not os.path.lexists(ref.path):
        raise ArtifactError("SourceNotFound", f"{ref} does not exist. Check the path, and that its writer has ended.")
    if ref.digest and known and known.digest != ref.digest:
        raise ArtifactError(
            "DigestMismatch",
            f"{ref}: another artifact ({known.digest[:19]}…) is there, perhaps published over the one that is meant. "
            "Publish each under a path of its own, or point to the digest that is there.",
        )
    files = list_files(ref.path, str(ref))
    if there is not None:  # what others have put beside its files is no part of it
        files = {row.path: files[row.path] for row in there.files if row.path in files}
    check_files(files, str(ref))
    part = None if choose is None else frozenset(choose(sorted(files)))
    chosen = files.keys() if part is None else part
    try:
        sizes = {path: file.stat().st_size for path, file in files.items()}
    except OSError as error:
        raise from_os(error, "Reading", str(ref)) from error
    total = sum(sizes.values())
    ticker = Ticker(total, progress)
    # A folder without manifest has no digest before it is read: it is staged under a name of its own.
    expected = ref.digest or (known.digest if known else "")
    stage = expected or "sha256:" + hashlib.sha256(f"{ref}|{sorted(sizes.items())}".encode()).hexdigest()
    with Staging(dest, stage, part=part) as staging:
        if part is None and expected and (done := staging.done()) is not None:
            ticker.add(total)
            return done
        staging.reserve(sum(sizes[path] for path in chosen))
        entries = [
            _copy(files[path], path, staging, ticker.add)
            if path in chosen
            else hash_file(files[path], ticker.add)._replace(path=path)
            for path in sorted(files)
        ]
        for path in chosen:
            check_content(path, staging.folder / path, str(ref))
        manifest = known or _describe(entries, str(ref))
        found = folder_digest(entries)
        if found != (expected or found):
            raise ArtifactError(
                "DigestMismatch",
                f"{ref} has the digest {found[:19]}… instead of {expected[:19]}…: a file in it was changed or is "
                "damaged. Publish it again, or point to the digest that is meant.",
            )
        manifest = manifest.model_copy(update={"digest": found, "size_bytes": total})
        staging.publish(manifest, entries)
    return manifest


def push(src: Path, ref: FolderRef, manifest: Manifest, progress: Progress | None, sent: Sent) -> tuple[str, Manifest]:
    """Copy `src` to a temporary name beside the target, then rename it into its place."""
    if ref.digest:
        raise ArtifactError("BadUri", f"{ref} names a digest. Push to a path; the digest follows from the content.")
    check_target(ref)
    files = list_files(src, str(src))
    verdicts = check_files(files, str(src))
    for path, file in files.items():
        check_content(path, file, str(src))
    entries = sent.entries(files)
    total = sum(entry.size for entry in entries)
    ticker = Ticker(total, progress)
    digest = folder_digest(entries)
    manifest = manifest.completed(digest=digest, format=manifest.format or detect_format(verdicts), size_bytes=total)
    with Staging(ref.path, digest, FOLDER_MANIFEST) as staging:
        if staging.done() == manifest and _holds(ref.path, entries, sent):
            ticker.add(total)
            return str(ref), manifest
        linked = {entry for entry in entries if sent.link(entry, ref.path, staging.target(entry.path))}
        staging.reserve(total)
        for entry in entries:
            if entry in linked:
                ticker.add(entry.size)
            elif _copy(files[entry.path], entry.path, staging, ticker.add) != entry:
                raise ArtifactError("DigestMismatch", f"{src}/{entry.path} changed while it was copied. Push it again.")
        sent.copied(staging.folder, entries)
        staging.publish(manifest, entries)
    return str(ref), manifest


def published(ref: FolderRef) -> Manifest | None:
    """Return the manifest of what was pushed there, if it is whole; what people have put there is not looked at."""
    _check_root(ref)
    there = installed(ref.path)
    return there.manifest if there is not None else None


def check_target(ref: FolderRef) -> None:
    """Refuse, before there is anything to push, a folder that would not take it. Raises ArtifactError."""
    if ref.path == (ref.root or Path("/")):
        raise ArtifactError("BadUri", f"{ref} is the whole volume. Name a folder on it, as in pvc://claim/models/one.")
    _check_root(ref)
    try:
        around = next((folder for folder in ref.path.parents if (folder / FOLDER_MANIFEST).is_file()), None)
        if around is None:
            check_vacant(ref.path, str(ref))
    except OSError as error:
        raise from_os(error, "Writing to", ref.path) from error
    if around is not None:
        other = around if ref.root is None else f"pvc://{around.relative_to(ref.root.parent)}"
        raise ArtifactError(
            "Refused",
            f"{ref} lies in the folder of another artifact, {other}, which would go when that one is published again. "
            "Choose a folder beside it.",
        )


def delete(ref: FolderRef) -> bool:
    """Remove a folder that we published; it is gone at once, its files as fast as the disk can."""
    _check_root(ref)
    there = installed(ref.path)
    if there is None:
        if os.path.lexists(ref.path):
            raise ArtifactError("BadUri", f"{ref} holds files that are not an artifact of ours. Remove them by hand.")
        return True
    if ref.digest not in (None, there.manifest.digest):
        return True
    others = foreign(ref.path)
    if others:
        raise ArtifactError("BadUri", f"{ref} holds {others[:200]!a}, which is not ours. Move it away first.")
    discard(ref.path, there.manifest.digest)
    return True


def discard_damaged(ref: FolderRef) -> bool:
    """Remove what is left of an artifact of ours that has lost files, all of them perhaps. True if that was there.

    Other people's files make a folder theirs, and stay; where our manifest is there and cannot be read, all count as
    ours. So this is for folders that nobody but us writes to.
    """
    _check_root(ref)
    try:
        if ref.path == ref.root or not ref.path.is_dir() or installed(ref.path) is not None:
            return False
        if not illegible(ref.path) and foreign(ref.path):
            return False
    except OSError as error:
        raise from_os(error, "Reading", ref.path) from error
    discard(ref.path, "sha256:" + "0" * 64)
    return True


def _holds(folder: Path, entries: Sequence[Entry], sent: Sent) -> bool:
    """Whether the files are what they were when they were published: their sizes alone do not tell."""
    try:
        return all(
            sent.holds(entry, folder) or hash_file(folder / entry.path)._replace(path=entry.path) == entry
            for entry in entries
        )
    except ArtifactError:
        return False


def _copy(source: Path, path: str, staging: Staging, on_bytes: Callable[[int], None]) -> Entry:
    """Copy one file, through a temporary name, down to the disk."""
    target = staging.target(path)
    part = staging.folder / f".slmops-part-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    digest, size = hashlib.sha256(), 0
    try:
        reader = os.fdopen(os.open(source, os.O_RDONLY | (0 if source.is_symlink() else os.O_NOFOLLOW)), "rb")
    except OSError as error:
        raise from_os(error, "Reading", source) from error
    try:
        with reader, part.open("wb") as writer:
            while block := reader.read(CHUNK):
                writer.write(block)
                digest.update(block)
                size += len(block)
                on_bytes(len(block))
            writer.flush()
            os.fsync(writer.fileno())
        part.replace(target)
    except OSError as error:
        raise from_os(error, f"Copying {path} to", staging.dest) from error
    return Entry(path, size, digest.hexdigest())


def _check_root(ref: FolderRef, must_exist: bool = True) -> None:
    """Refuse a claim that is not mounted, and a link that leads out of it."""
    if ref.root is None:
        return
    if must_exist and not ref.root.is_dir():
        raise ArtifactError(
            "SourceNotFound",
            f"{ref}: the claim {ref.root.name!r} is not mounted here. Check that it exists and is bound.",
        )
    root = os.path.realpath(ref.root)
    path = os.path.realpath(ref.path)
    if path != root and not path.startswith(f"{root}{os.sep}"):
        raise ArtifactError("BadUri", f"{ref} leads out of its claim through a symbolic link. Name the real path.")


def _describe(entries: list[Entry], where: str) -> Manifest:
    """Make a manifest for files that came without one."""
    verdicts = check_files([entry.path for entry in entries], where)
    weights = any(verdict.role == "weight" for verdict in verdicts.values())
    data = not weights and any(verdict.role == "dataset" for verdict in verdicts.values())
    return Manifest(
        kind="dataset" if data else "model",
        format=detect_format(verdicts),
        digest=folder_digest(entries),
        size_bytes=sum(entry.size for entry in entries),
    )
