"""The registry and its garbage collection: `keeper.py serve CONFIG`, in place of `docker-registry serve CONFIG`.

Deleting a manifest frees no disk; `docker-registry garbage-collect` does, and must not run beside the registry: it
takes the files of a push whose manifest is still to come. So a dry run, which harms nothing, looks for garbage now and
then; if there is some that is older than any push, the registry stops for the seconds that collection takes. What its
clients are sending ends first (http.draintimeout in its configuration); then they see a refused connection and try
again, and a push that lost files sends them again.

Where room is short no age is waited for: checkpoints of large models fill a volume within the hour. Then garbage is
collected as soon as nobody uploads, for what nothing names may else be a push that is halfway.

The registry keeps the parts of uploads that broke off, and on a full volume those are the last room there was. It
refuses to end such an upload for its client, and has its file open until it stops: so they are removed then, too.

A process that is killed at any moment leaves a whole storage behind: collection removes only what nothing names.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

REGISTRY = "/usr/bin/docker-registry"
STORAGE = Path(os.environ.get("SLMOPS_REGISTRY_STORAGE", "/var/lib/registry"))
BLOBS = STORAGE / "docker/registry/v2/blobs"
REPOSITORIES = STORAGE / "docker/registry/v2/repositories"
LOOK_SECONDS = float(os.environ.get("SLMOPS_REGISTRY_LOOK_SECONDS", "600"))
"""Between two looks for garbage."""
AGE_SECONDS = float(os.environ.get("SLMOPS_REGISTRY_AGE_SECONDS", "3600"))
"""A file that nothing names is garbage when it is that old; a younger one may belong to a push."""
UPLOAD_SECONDS = 600.0
"""An upload of which nothing came for so long is over: its client has given up, or begins anew."""
SHORT = float(os.environ.get("SLMOPS_REGISTRY_SHORT", "0.2"))
"""Share of the volume: with less free, room is short."""
STOP_SECONDS = 30.0

_ELIGIBLE = re.compile(r"blob eligible for deletion: sha256:([0-9a-f]{64})")


class Keeper:
    """One child at a time: the registry, or the collection of its garbage."""

    def __init__(self, config: str) -> None:
        self._config = config
        self._stopping = False
        self._complaint = self._said = ""  # of the last look, and what was last printed
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Serve until SIGTERM (0) or until the registry ends by itself. Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while True:
            registry = self._start("serve")
            while True:
                try:
                    ended = registry.wait(LOOK_SECONDS)
                    return 0 if self._stopping else abs(ended) or 1
                except subprocess.TimeoutExpired:
                    if not self._stopping and self._has_garbage():
                        break
            registry.terminate()
            try:
                registry.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                registry.kill()
                registry.wait()
            if self._stopping:
                return 0
            began = time.monotonic()
            for folder in uploads()[0]:
                shutil.rmtree(folder, ignore_errors=True)
            code = self._start("garbage-collect").wait()
            print(f"Garbage was collected in {time.monotonic() - began:.1f} s, exit status {code}", flush=True)
            if self._stopping:
                return 0

    def _start(self, verb: str) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL if verb != "serve" else None  # it names every file
        self._child = subprocess.Popen([REGISTRY, verb, self._config], stdout=quiet)
        if self._stopping:
            self._child.terminate()
        return self._child

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # the signature of signal handlers
        self._stopping = True
        if self._child is not None:
            self._child.terminate()

    def _has_garbage(self) -> bool:
        """Look beside the running registry. An empty storage makes the dry run fail: there is nothing in it."""
        filled = BLOBS.exists()
        looked = subprocess.run(
            [REGISTRY, "garbage-collect", "--dry-run", self._config], capture_output=True, text=True, check=False
        )
        said = looked.stderr.strip().splitlines()
        self._note(said[-1] if filled and looked.returncode and said else "")
        found = _ELIGIBLE.findall(looked.stdout) if looked.returncode == 0 else []
        over, uploading = uploads()  # after the look: what it found of a push that goes on is held by its next file
        if any((folder / "data").exists() for folder in over) or any(old(digest) for digest in found):
            return True
        return bool(found) and not uploading and room_is_short()

    def _note(self, complaint: str) -> None:
        """Say once why nothing can be collected. A look that fails alone met what the registry was just changing."""
        if complaint and complaint == self._complaint and complaint != self._said:
            print(f"Garbage cannot be collected, and the disk will fill: {complaint}", flush=True)
            self._said = complaint
        self._complaint = complaint


def old(digest: str) -> bool:
    """Whether the file of this SHA-256 is there and older than any push."""
    file = BLOBS / "sha256" / digest[:2] / digest / "data"
    try:
        return time.time() - file.stat().st_mtime > AGE_SECONDS
    except OSError:
        return False


def room_is_short() -> bool:
    """Whether the next pushes may find no room."""
    usage = shutil.disk_usage(STORAGE)
    return usage.free < SHORT * (usage.used + usage.free)  # as df counts: some of the total is nobody's


def uploads() -> tuple[list[Path], bool]:
    """The folders of the uploads that are over, and whether something of another one has come."""
    over, going_on = [], False
    for folder in _uploads():
        data = folder / "data"
        with contextlib.suppress(OSError):  # it ended in this moment
            begun = data.exists()
            if time.time() - (data if begun else folder).stat().st_mtime > UPLOAD_SECONDS:
                over.append(folder)
            else:
                going_on = going_on or begun
    return over, going_on


def _uploads() -> Iterator[Path]:
    """The folder of each upload. Names of repositories have slashes."""
    for parent, names, _ in os.walk(REPOSITORIES):
        if parent.endswith("/_uploads"):
            yield from (Path(parent, name) for name in names)
            names.clear()
        names[:] = [name for name in names if name not in ("_layers", "_manifests")]


def main(arguments: list[str]) -> int:
    """Keep the registry of `serve CONFIG`; hand any other command to docker-registry."""
    if len(arguments) != 2 or arguments[0] != "serve":
        os.execv(REGISTRY, [REGISTRY, *arguments])  # noqa: S606  # no shell is wanted
    # Uploads go on after a collection only if the next registry can read what the last one signed.
    os.environ.setdefault("REGISTRY_HTTP_SECRET", secrets.token_hex(32))
    return Keeper(arguments[1]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
