"""The run's checkpoint: one artifact at `spec.checkpoint`, replaced as a whole or not at all.

In a registry the last two are kept: the tag is on the newest, which names the one before it. So a run goes on although
the newest was damaged in the store, and a run of days leaves no more behind than a run of an hour.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from slmops_artifacts import Manifest, Sent, delete, pinned, pull, push, read_manifest
from slmops_artifacts.errors import ArtifactError
from slmops_artifacts.files import folder_digest, list_files
from slmops_artifacts.folder import discard_damaged
from slmops_artifacts.uris import FolderRef, OciRef, parse
from slmops_trainer.failure import RunFailure, from_artifact

ANNOTATION_UID = "slmops.dev/run-uid"
PREVIOUS = "slmops.dev/previous-checkpoint"
DAMAGED = ("DigestMismatch", "SourceNotFound", "UnsupportedFormat")
QUICK = 10.0  # seconds of patience for what costs no result if it is left: removals, sharing

log = logging.getLogger("slmops")


class Checkpoints:
    """Saves and loads one folder. Its first-level subfolders are parts: `run/`, `generation/`, `evaluation/`, ...

    The folder is always the same (`folder`): `load` fills it, parts write into it, `save` publishes it.
    What another `uid` saved at the URI is neither used nor removed; an empty one is for what runs share.
    Complete-only: a push that breaks off leaves the previous checkpoint in place.
    """

    def __init__(self, uri: str, folder: Path, uid: str, created: str) -> None:
        self.uri = uri
        self.folder = folder
        self._uid = uid
        self._created = created
        self._sent = Sent()
        self._published = ""  # digest of the files that the store has
        self._found: bool | None = None  # None: not looked for yet
        self._good = ""  # pinned URI of the newest checkpoint that is known to be whole, where the store keeps several
        self._older: list[str] = []  # pinned URIs that the next save makes superfluous
        self._refused = ""  # why the store took none lately

    def is_passing(self, failure: RunFailure) -> bool:
        """Whether the store refuses credentials that are being replaced: it has taken a checkpoint of this run."""
        return failure.reason == "AccessDenied" and bool(self._found or self._published)

    def load(self, patience: float | None = None) -> Path | None:
        """The folder with the last complete checkpoint, None where there is none yet. Pulls once.

        `patience`: seconds for which a store that is away is waited for. A damaged folder holds none, and is removed
        with a warning: it could neither be read nor replaced. Raises RunFailure when the store cannot be reached:
        starting over would throw away what was paid for.
        """
        if self._found is None:
            try:
                ref = parse(self.uri)
                if isinstance(ref, FolderRef) and discard_damaged(ref):
                    log.warning("Removed a damaged checkpoint: %s", self.uri)
                manifest = read_manifest(self.uri, patience=patience)
                if manifest is not None and manifest.annotations.get(ANNOTATION_UID) == self._uid:
                    self._pull(manifest, patience)
                    self._found = True
                else:
                    self._found = False
            except ArtifactError as error:
                raise from_artifact(error, writing=True) from error
        return self.folder if self._found else None

    def save(self, folder: Path | None = None, patience: float | None = None) -> str:
        """Publish the folder. Cheap when nothing changed, and files that did not change are not sent again.

        `patience`: seconds for which a store that is away is waited for. What was saved before stays until the new
        one is whole. Returns why a store that works refuses it, such as one that lets no tag be replaced: waiting helps
        nothing then, and the run goes on without. Raises RunFailure(StoreUnavailable, DiskFull, AccessDenied); a store
        without the repository counts as away, for it would not take the result either.
        """
        source = folder or self.folder
        files = list_files(source, str(source))
        digest = folder_digest(self._sent.entries(files))
        if not files or digest == self._published:
            return ""
        annotations = {ANNOTATION_UID: self._uid, **({PREVIOUS: self._good} if self._good else {})}
        manifest = Manifest(kind="checkpoint", annotations=annotations, created=self._created)
        try:
            uri, _ = push(source, self.uri, manifest, patience=patience, sent=self._sent)
        except ArtifactError as error:
            if error.reason != "Refused":
                raise from_artifact(error, writing=True) from error
            if error.message != self._refused:  # once, not every few seconds
                log.warning("The store takes no checkpoint, and the run goes on without: %s", error.message)
            self._refused = error.message
            return error.message
        self._published, self._refused = digest, ""
        if isinstance(parse(self.uri), OciRef):
            self._remove([old for old in self._older if old not in (uri, self._good)])
            self._older = [self._good] if self._good else []
            self._good = uri
        return ""

    def discard(self) -> None:
        """Remove the checkpoints of a run whose result is safe. What cannot be removed is left, with a warning."""
        try:
            manifest = read_manifest(self.uri, patience=QUICK)
            if manifest is None or manifest.annotations.get(ANNOTATION_UID) != self._uid:
                return
            # The newest last: it is what leads to the others.
            self._remove([*_before(manifest), pinned(self.uri, manifest)])
        except ArtifactError as error:
            log.warning("Left the checkpoint in the store: %s", error.message)

    def _pull(self, newest: Manifest, patience: float | None) -> None:
        """Fill the folder from the newest checkpoint; from the one before it, if the store has damaged the newest."""
        uri, previous = pinned(self.uri, newest), newest.annotations.get(PREVIOUS, "")
        before = list(_before(newest))
        try:
            pull(uri, self.folder, patience=patience)
            good = uri
        except ArtifactError as error:
            if error.reason not in DAMAGED or not previous:
                raise
            log.warning("Went back to the checkpoint before the last one: %s", error.message)
            pull(previous, self.folder, patience=patience)
            good = previous
        if isinstance(parse(self.uri), OciRef):
            self._good, self._older = good, [old for old in (uri, *before) if old != good]

    def _remove(self, uris: list[str]) -> None:
        for uri in uris:
            try:
                if not delete(uri, patience=QUICK):
                    log.warning("Left %s in the store, which allows no removal", uri)
            except ArtifactError as error:
                log.warning("Left %s in the store: %s", uri, error.message)


def _before(manifest: Manifest) -> Iterator[str]:
    """The pinned URIs of the checkpoints before this one, newest first: more than one only if a pod was killed.

    They are named to be removed: one that cannot be read ends the list, and no more.
    """
    found: Manifest | None = manifest
    while found is not None and (previous := found.annotations.get(PREVIOUS)):
        yield previous
        try:
            found = read_manifest(previous, patience=QUICK)
        except ArtifactError as error:
            log.warning("Did not look for the checkpoints before %s: %s", previous, error.message)
            return
