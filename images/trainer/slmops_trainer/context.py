"""What every recipe is given: the spec, a scratch folder, ways to report, to pull, to push, and the wish to stop."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from slmops.api.meta import Artifact
from slmops.api.run import SECRET_ROOT, WORK_DIR, Input, RunSpec
from slmops_artifacts import Manifest, pull, push, read_manifest, waiting
from slmops_artifacts.errors import ArtifactError
from slmops_artifacts.files import Choose
from slmops_artifacts.folder import check_target, published
from slmops_artifacts.uris import FolderRef, OciRef, parse
from slmops_trainer.checkpoints import ANNOTATION_UID, Checkpoints
from slmops_trainer.failure import RunFailure, from_artifact, interrupted
from slmops_trainer.progress import Board

BEGAN = "run/began.json"  # the checkpoint's file
STORE_PATIENCE = 3600.0  # seconds for which a store that is away or full is waited for, with the result in hand
# Seconds for which credentials that the store refuses are waited for then: replaced ones take minutes to reach the pod.
ACCESS_PATIENCE = 600.0
STORE_PAUSE = 15.0  # seconds between two tries
# Seconds for which a store that is away holds up the run, and the end of the pod (whose grace is 60 s).
SAVE_PATIENCE = 30.0

log = logging.getLogger("slmops")


class Context:
    """One run in one pod.

    spec         what to do
    work         an empty scratch folder on the node's disk
    stop         set by SIGTERM: finish what cannot be repeated, save it, and call `check`
    metrics      what goes into the result, by name
    checkpoints  the run's one checkpoint (see checkpoints.py)
    """

    def __init__(self, spec: RunSpec, work: Path = Path(WORK_DIR), board: Board | None = None) -> None:
        self.spec = spec
        self.work = work
        self.stop = threading.Event()
        self.board = board or Board()
        self.store_patience = STORE_PATIENCE
        self.metrics: dict[str, float] = {}
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(spec.checkpoint, work / "checkpoint", spec.uid, self.started)

    def report(self, stage: str, step: int, total: int, message: str = "", percent: int | None = None) -> None:
        """`step` of `total` of `stage` is done; `percent` of the whole run follows from `board.plan` unless given."""
        if stage != self.board.progress.stage:
            log.info("Stage began: %s", stage)
        self.board.report(stage, step, total, message, percent)

    def live(self, **values: float) -> None:
        """Gauges for Prometheus: loss, learning_rate, tokens_per_second, step, ..."""
        self.board.live(**values)

    def metric(self, name: str, value: float) -> None:
        """A number of the result (RunResult.metrics, the artifact's manifest, and a gauge)."""
        self.metrics[name] = float(value)
        self.board.result(name, float(value))

    def check(self) -> None:
        """Raise RunFailure(Interrupted) if the pod was asked to end. Call it between units of work that are saved."""
        if self.stop.is_set():
            raise interrupted("The pod was asked to stop; the run goes on from its checkpoint in the next pod.")

    def pull(
        self, source: Input, folder: str, stage: str = "Pulling", choose: Choose | None = None
    ) -> tuple[Path, Manifest]:
        """Fetch an artifact into `work/folder`. Returns the folder and the manifest (its digest is the content's).

        `choose` says which of its files are wanted (see slmops_artifacts.pull).

        A source that is away is waited for, for some minutes (see slmops_artifacts), and SIGTERM ends the waiting.
        Raises RunFailure(SourceNotFound, SourceUnavailable, AccessDenied, UnsupportedModel, DiskFull, Interrupted).
        """
        target = self.work / folder

        def progress(done: int, total: int) -> None:
            self.check()
            self.report(stage, done >> 20, max(1, total >> 20), f"{source.uri}: {done >> 20} of {total >> 20} MiB")

        try:
            with self.told(stage, "source"):
                manifest = pull(source.uri, target, secret=read_secret(source.secret), progress=progress, choose=choose)
        except ArtifactError as error:
            raise from_artifact(error.from_secret(source.secret)) from error
        log.info("Pulled %s (%s, %d bytes)", source.uri, manifest.digest, manifest.size_bytes)
        return target, manifest

    def resume(self) -> None:
        """Load what an earlier pod of this run saved into the checkpoints' folder. Raises those of Checkpoints.load."""
        with self.told("Looking for checkpoints", "store"):
            self.checkpoints.load()

    def began(self) -> datetime:
        """When the run's first pod began: what a template that writes the date writes in every pod of the run.

        Else a run that goes on after midnight would be asked and trained with other tokens than it began with.
        Raises those of Checkpoints.load.
        """
        self.resume()
        path = self.checkpoints.folder / BEGAN
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.started))
        return datetime.fromisoformat(json.loads(path.read_text()))

    def keep(self) -> str:
        """Save the checkpoint. Returns what prevented it, if the store may be mended: then the run goes on without.

        Credentials that the store refuses are among that once it has taken a checkpoint: they are being replaced.
        Raises RunFailure(AccessDenied) before.
        """
        try:
            return self.checkpoints.save(patience=SAVE_PATIENCE)
        except RunFailure as failure:
            mended = failure.reason in ("StoreUnavailable", "DiskFull")
            if not mended and not self.checkpoints.is_passing(failure):
                raise
            log.warning("Did not save the checkpoint: %s", failure.message)
            return failure.message

    def push(
        self, folder: Path, manifest: Manifest, uri: str = "", stage: str = "Publishing"
    ) -> tuple[Artifact, Manifest]:
        """Publish `folder` at `uri` (default: spec.output). Not broken off by SIGTERM: it was paid for.

        A store that is away or full is waited for, up to an hour, and one that refuses the credentials ten minutes:
        what lies in this pod exists nowhere else, and each try reads them anew.
        Raises RunFailure(StoreUnavailable, AccessDenied, DiskFull, Interrupted).
        """
        target = uri or self.spec.output

        def progress(done: int, total: int) -> None:
            self.report(stage, done >> 20, max(1, total >> 20), f"{done >> 20} of {total >> 20} MiB")

        annotations = {**manifest.annotations, ANNOTATION_UID: self.spec.uid}
        whole = manifest.model_copy(update={"annotations": annotations})
        patience = dict.fromkeys(("StoreUnavailable", "DiskFull"), self.store_patience)
        patience["AccessDenied"] = min(self.store_patience, ACCESS_PATIENCE)
        ends: dict[str, float] = {}
        while True:
            try:
                pinned, pushed = push(folder, target, whole, progress=progress, patience=STORE_PAUSE)
            except ArtifactError as error:
                failure = from_artifact(error, writing=True)
                now = time.monotonic()
                left = ends.setdefault(failure.reason, now + patience.get(failure.reason, 0.0)) - now
                if left <= 0:
                    raise failure from error
                log.warning("Waits for the store: %s", error.message)
                self.report(stage, 0, 1, f"Waits for the store: {error.message}")
            else:
                log.info("Pushed %s (%s, %d bytes)", pinned, pushed.digest, pushed.size_bytes)
                return Artifact(uri=pinned, digest=pushed.digest, size_bytes=pushed.size_bytes), pushed
            if self.stop.wait(min(STORE_PAUSE, left)):
                raise interrupted(f"The pod was asked to stop while it waited for the store: {failure.message}")

    @contextmanager
    def told(self, stage: str, what: str) -> Iterator[None]:
        """Waiting for `what` within the block stands in the progress, and SIGTERM ends it with Interrupted."""

        def wait(error: ArtifactError, seconds: float) -> None:
            log.warning("Waits for the %s: %s", what, error.message)
            self.report(stage, 0, 1, f"Waits for the {what}: {error.message}")
            if self.stop.wait(seconds):
                raise interrupted(f"The pod was asked to stop while it waited for the {what}: {error.message}")

        with waiting(wait):
            yield

    def existing(self, uri: str = "") -> tuple[Artifact, Manifest] | None:
        """What an earlier pod of this very run published at `uri` (default: spec.output), else None.

        Raises RunFailure(StoreUnavailable) if that is a folder which would not take what the run is about to make.
        """
        target = uri or self.spec.output
        try:
            ref = parse(target)
            with self.told("Looking for results", "store"):
                found = published(ref) if isinstance(ref, FolderRef) else read_manifest(target)
            own = found is not None and found.annotations.get(ANNOTATION_UID) == self.spec.uid
            if not own and isinstance(ref, FolderRef):
                check_target(ref)
        except ArtifactError as error:
            raise from_artifact(error, writing=True) from error
        if found is None or not own:
            return None
        log.info("Found what an earlier pod of this run published uri=%s", target)
        pinned = ref.pinned(found.digest) if isinstance(ref, OciRef) else target
        return Artifact(uri=pinned, digest=found.digest, size_bytes=found.size_bytes), found


def read_secret(name: str | None) -> dict[str, str] | None:
    """The keys of the mounted Secret `name`. Raises RunFailure(BadSpec) when it is not mounted.

    Raises RunFailure(AccessDenied) when it is no text: by that reason the operator tries again when a Secret changes.
    """
    if not name:
        return None
    folder = Path(SECRET_ROOT) / name
    if not folder.is_dir():
        raise RunFailure("BadSpec", f"Secret {name} is not mounted in the pod. Create it in the object's namespace.")
    # The kubelet keeps the content behind links named ..data: only the keys themselves are files of their own.
    try:
        return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}
    except UnicodeDecodeError as error:
        raise RunFailure(
            "AccessDenied", f"Secret {name} holds a value that is not text. Put its keys there as text."
        ) from error
