"""The artifact URIs: oci://, pvc://, hf:// and file://, parsed strictly before anything is opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from .errors import ArtifactError

SCHEMES = "oci://registry/repo:tag, pvc://claim/path, hf://org/name@revision, file:///path"

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CLAIM = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True, slots=True)
class OciRef:
    """A repository in an OCI registry, with a tag, a digest, or both (the digest wins)."""

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @property
    def reference(self) -> str:
        """What to ask the registry for."""
        return self.digest or self.tag or "latest"

    def pinned(self, digest: str) -> str:
        """Return the URI that always means this content; the tag stays in it for readers."""
        return f"oci://{self.host}/{self.repository}:{self.tag or 'latest'}@{digest}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"oci://{self.host}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, slots=True)
class FolderRef:
    """A folder (or one file) on a mounted volume. `root` bounds where symlinks may lead."""

    uri: str
    path: Path
    root: Path | None
    digest: str | None

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model or dataset repository on the Hugging Face Hub or a mirror of it."""

    kind: Literal["model", "dataset"]
    repository: str
    revision: str

    @property
    def is_commit(self) -> bool:
        """Whether the revision is one that always means the same content."""
        return _COMMIT.fullmatch(self.revision) is not None

    def pinned(self, commit: str) -> str:
        """Return the URI that always means this commit."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repository}@{commit}"

    def __str__(self) -> str:
        return self.pinned(self.revision)


Ref = OciRef | FolderRef | HubRef


def parse(uri: str) -> Ref:
    """Read `uri`, or say exactly what is wrong with it."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise _bad("an artifact URI", f"it has no scheme; write one of {SCHEMES}")
    match scheme:
        case "oci":
            return _oci(uri, rest)
        case "pvc":
            return _pvc(uri, rest)
        case "hf":
            return _hub(uri, rest)
        case "file":
            return _file(uri, rest)
        case _:
            raise _bad(f"the scheme {scheme[:20]!r}", f"it is not known; write one of {SCHEMES}")


def _oci(uri: str, rest: str) -> OciRef:
    host, _, path = rest.partition("/")
    if "@" in host:
        raise _bad("an oci:// URI", "it carries a user name or password; put credentials into a Secret instead")
    port = host.rpartition("]")[2].rpartition(":")[2]
    if not _HOST.fullmatch(host) or (port.isdecimal() and ":" in host and not 0 < int(port) < 65536):
        raise _bad(uri, "the registry must look like registry.example.com or 10.0.0.1:5000")
    name, at, digest = path.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _bad(uri, "the digest must be @sha256: and 64 hexadecimal digits")
    repository, colon, tag = name.partition(":")
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 255:
        raise _bad(uri, "the repository must be lower case letters, digits and . _ - between slashes")
    if colon and not _TAG.fullmatch(tag):
        raise _bad(uri, "the tag must be at most 128 letters, digits, dots, dashes and underscores")
    return OciRef(host, repository, tag or None, digest or None)


def _pvc(uri: str, rest: str) -> FolderRef:
    name, digest = _split_digest(uri, rest)
    claim, _, path = name.partition("/")
    if not _CLAIM.fullmatch(claim):
        raise _bad(uri, "after pvc:// comes the name of a PersistentVolumeClaim, then /path")
    segments = [part for part in path.split("/") if part]
    if any(part in (".", "..") or "\0" in part for part in segments):
        raise _bad(uri, "the path must not leave the claim: remove '.' and '..'")
    root = Path(os.environ.get("SLMOPS_PVC_ROOT", "/slmops/pvc")) / claim
    return FolderRef(uri, root.joinpath(*segments), root, digest)


def _file(uri: str, rest: str) -> FolderRef:
    name, digest = _split_digest(uri, rest)
    if not name.startswith("/") or "\0" in unquote(name):
        raise _bad(uri, "write file:/// and an absolute path")
    return FolderRef(uri, Path(os.path.normpath(unquote(name))), None, digest)


def _hub(uri: str, rest: str) -> HubRef:
    name, at, revision = rest.partition("@")
    kind: Literal["model", "dataset"] = "dataset" if name.startswith("datasets/") else "model"
    repository = name.removeprefix("datasets/")
    parts = repository.split("/")
    if len(parts) > 2 or not all(_HUB_NAME.fullmatch(part) and ".." not in part for part in parts):
        raise _bad(uri, "write hf://org/name@revision or hf://datasets/org/name@revision")
    if at and (not _HUB_REVISION.fullmatch(revision) or ".." in revision):
        raise _bad(uri, "the revision must be a branch, a tag or a commit")
    return HubRef(kind, repository, revision or "main")


def _split_digest(uri: str, rest: str) -> tuple[str, str | None]:
    name, at, digest = rest.rpartition("@sha256:")
    if not at:
        return rest, None
    if not _DIGEST.fullmatch(f"sha256:{digest}"):
        raise _bad(uri, "the digest must be @sha256: and 64 hexadecimal digits")
    return name, f"sha256:{digest}"


def _bad(what: str, why: str) -> ArtifactError:
    return ArtifactError("BadUri", f"Cannot read {what}: {why}.")
