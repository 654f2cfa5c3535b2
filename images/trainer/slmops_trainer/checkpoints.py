"""The run's checkpoint: one artifact at `spec.checkpoint`, replaced as a whole or not at all."""

from pathlib import Path

from slmops_artifacts import Manifest, pull, push, read_manifest
from slmops_artifacts.errors import ArtifactError
from slmops_artifacts.files import folder_digest, hash_file, list_files
from slmops_trainer.failure import from_artifact


class Checkpoints:
    """Saves and loads one folder. Its first-level subfolders are parts: `generation/`, `evaluation/`, `training/`.

    The folder is always the same (`folder`): `load` fills it, parts write into it, `save` publishes it.
    Complete-only: a push that breaks off leaves the previous checkpoint in place.
    """

    def __init__(self, uri: str, folder: Path, uid: str, created: str) -> None:
        self.uri = uri
        self.folder = folder
        self._uid = uid
        self._created = created
        self._published = ""  # digest of the files that the store has
        self._found: bool | None = None  # None: not looked for yet

    def load(self) -> Path | None:
        """The folder with the last complete checkpoint, None where there is none yet. Pulls once.

        Raises RunFailure when the store cannot be reached: starting over would throw away what was paid for.
        """
        if self._found is None:
            try:
                self._found = read_manifest(self.uri) is not None
                if self._found:
                    pull(self.uri, self.folder)
            except ArtifactError as error:
                raise from_artifact(error, writing=True) from error
        return self.folder if self._found else None

    def save(self, folder: Path | None = None) -> None:
        """Publish the folder. Cheap when nothing changed, and files that did not change are not sent again.

        Raises RunFailure(StoreUnavailable, DiskFull, AccessDenied).
        """
        source = folder or self.folder
        files = list_files(source, str(source))
        digest = folder_digest(hash_file(path)._replace(path=name) for name, path in files.items())
        if not files or digest == self._published:
            return
        manifest = Manifest(kind="checkpoint", annotations={"slmops.dev/run-uid": self._uid}, created=self._created)
        try:
            push(source, self.uri, manifest)
        except ArtifactError as error:
            raise from_artifact(error, writing=True) from error
        self._published = digest
