"""The artifact store of SLMOps: models, datasets and checkpoints by content, wherever they lie.

    manifest = pull("oci://registry:5000/team/model:v1", Path("/models/base"))
    uri, manifest = push(Path("out"), "oci://registry:5000/team/tuned:v1", Manifest(kind="model"))

Every failure is an `ArtifactError` with a reason for machines and a sentence for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import ArtifactError, Reason
from .model import Manifest, Parent
from .uris import FolderRef, HubRef, OciRef, parse

__all__ = ["ArtifactError", "Manifest", "Parent", "Reason", "pull", "push", "read_manifest", "resolve"]

Secret = Mapping[str, Any]


def pull(
    uri: str,
    dest: Path,
    *,
    secret: Secret | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Bring the artifact behind `uri` to the folder `dest`, verified and whole.

    `dest` is made, or may be an empty folder such as a mount; the file `.slmops-complete` in it comes last.
    A second call finds the work done; a call after a kill goes on where the first one stopped.
    """
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.pull(ref, Path(dest), secret, progress)
        case HubRef() as ref:
            from . import hub

            return hub.pull(ref, Path(dest), secret, progress)
        case FolderRef() as ref:
            from . import folder

            return folder.pull(ref, Path(dest), progress)


def push(
    src: Path,
    uri: str,
    manifest: Manifest,
    *,
    secret: Secret | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, Manifest]:
    """Publish the folder `src` under `uri`. Returns the pinned URI and the manifest with its digest.

    Equal files and an equal manifest give an equal digest, and files that the store has are not sent again.
    """
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.push(Path(src), ref, manifest, secret, progress)
        case FolderRef() as ref:
            from . import folder

            return folder.push(Path(src), ref, manifest, progress)
        case HubRef() as ref:
            raise ArtifactError(
                "BadUri", f"{ref} cannot be written: the Hub is a source only. Push to oci:// or pvc://."
            )


def resolve(uri: str, *, secret: Secret | None = None) -> str | None:
    """Return the digest that is behind `uri` now; None when there is nothing."""
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.resolve(ref, secret)
        case HubRef() as ref:
            from . import hub

            return hub.resolve(ref, secret)
        case FolderRef() as ref:
            from . import folder

            return folder.resolve(ref)


def read_manifest(uri: str, *, secret: Secret | None = None) -> Manifest | None:
    """Return the manifest behind `uri` without its files; None when there is nothing."""
    match parse(uri):
        case OciRef() as ref:
            from . import oci

            return oci.read_manifest(ref, secret)
        case HubRef() as ref:
            from . import hub

            return hub.read_manifest(ref, secret)
        case FolderRef() as ref:
            from . import folder

            return folder.read_manifest(ref)
