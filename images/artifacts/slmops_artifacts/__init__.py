"""The artifact store of SLMOps: models, datasets and checkpoints by content, wherever they lie.

    manifest = pull("oci://registry:5000/team/model:v1", Path("/models/base"))
    uri, manifest = push(Path("out"), "oci://registry:5000/team/tuned:v1", Manifest(kind="model"))

Every failure is an `ArtifactError` with a reason for machines and a sentence for people.

`patience` is for how many seconds a store that refuses, fails or is away is tried again while nothing moves
(default: SLMOPS_RETRY_SECONDS, 300); one that takes the connection and says nothing gets a minute at most.
`waiting` tells of it, and can end it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import ArtifactError, Reason
from .files import Choose, Ticker
from .model import Manifest, Parent
from .sent import Sent
from .staging import installed
from .uris import FolderRef, HubRef, OciRef, Ref, parse
from .waiting import waiting

__all__ = [
    "ArtifactError",
    "Manifest",
    "Parent",
    "Reason",
    "Sent",
    "delete",
    "pinned",
    "pull",
    "push",
    "read_manifest",
    "resolve",
    "waiting",
]

Secret = Mapping[str, Any]


def pull(
    uri: str,
    dest: Path,
    *,
    secret: Secret | None = None,
    progress: Callable[[int, int], None] | None = None,
    patience: float | None = None,
    choose: Choose | None = None,
) -> Manifest:
    """Bring the artifact behind `uri` to the folder `dest`, verified and whole.

    `dest` is made, or may be an empty folder such as a mount; the file `.slmops-complete` in it comes last.
    A second call finds the work done, and asks no store for that when the URI is pinned; a call after a kill goes on
    where the first one stopped.
    `choose` is given the paths of all files and returns those to bring; it may raise. The manifest is the whole's.
    """
    ref, dest = parse(uri), Path(dest)
    there = _held(ref, dest) if choose is None else None
    if there is not None:
        Ticker(there.size_bytes, progress).add(there.size_bytes)
        return there
    match ref:
        case OciRef():
            from . import oci

            return oci.pull(ref, dest, secret, progress, patience, choose)
        case HubRef():
            from . import hub

            return hub.pull(ref, dest, secret, progress, patience, choose)
        case FolderRef():
            from . import folder

            return folder.pull(ref, dest, progress, choose)


def _held(ref: Ref, dest: Path) -> Manifest | None:
    """What lies whole in `dest`, if a pinned URI means just that: then no store is asked, which may be away."""
    there = installed(dest)
    if there is None:
        return None
    if isinstance(ref, HubRef):
        from . import hub

        same = ref.is_commit and there.manifest.annotations.get(hub.SOURCE) == str(ref)
    else:
        same = ref.digest == there.manifest.digest
    return there.manifest if same else None


def push(
    src: Path,
    uri: str,
    manifest: Manifest,
    *,
    secret: Secret | None = None,
    progress: Callable[[int, int], None] | None = None,
    patience: float | None = None,
    sent: Sent | None = None,
) -> tuple[str, Manifest]:
    """Publish the folder `src` under `uri`. Returns the pinned URI and the manifest with its digest.

    Equal files and an equal manifest give an equal digest, and files that the store has are not sent again.
    `sent`: what is known from the last push to this URI, for who pushes there every few seconds.
    """
    sent = sent or Sent()
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.push(Path(src), ref, manifest, secret, progress, patience, sent)
        case FolderRef() as ref:
            from . import folder

            return folder.push(Path(src), ref, manifest, progress, sent)
        case HubRef() as ref:
            raise ArtifactError(
                "BadUri", f"{ref} cannot be written: the Hub is a source only. Push to oci:// or pvc://."
            )


def delete(uri: str, *, secret: Secret | None = None, patience: float | None = None) -> bool:
    """Remove the artifact behind `uri`; what is gone already is fine. False where the store allows no removal.

    In a registry, every tag of this content in the repository goes with it.
    """
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.delete(ref, secret, patience)
        case FolderRef() as ref:
            from . import folder

            return folder.delete(ref)
        case HubRef():
            return False


def pinned(uri: str, manifest: Manifest) -> str:
    """Return the URI that always means the content of `manifest`, which was pulled from `uri`."""
    match parse(uri):
        case OciRef() as ref:
            return ref.pinned(manifest.digest)
        case HubRef():
            from . import hub

            return manifest.annotations.get(hub.SOURCE, uri)
        case FolderRef():
            return uri  # a folder has one content only, and its digest stands beside the URI


def resolve(uri: str, *, secret: Secret | None = None, patience: float | None = None) -> str | None:
    """Return the digest that is behind `uri` now; None when there is nothing."""
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.resolve(ref, secret, patience)
        case HubRef() as ref:
            from . import hub

            return hub.resolve(ref, secret, patience)
        case FolderRef() as ref:
            from . import folder

            return folder.resolve(ref)


def read_manifest(uri: str, *, secret: Secret | None = None, patience: float | None = None) -> Manifest | None:
    """Return the manifest behind `uri` without its files; None when there is nothing."""
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.read_manifest(ref, secret, patience)
        case HubRef() as ref:
            from . import hub

            return hub.read_manifest(ref, secret, patience)
        case FolderRef() as ref:
            from . import folder

            return folder.read_manifest(ref)
