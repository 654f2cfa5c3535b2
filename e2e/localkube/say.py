"""What the user reads: progress lines with elapsed seconds, and failures that say how to go on."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from localkube import paths

_started = time.monotonic()
BEAT_SECONDS = 10.0
FULL = "No space left on device"
GO_ON = "mend that and run the same command again"


class Failure(Exception):  # noqa: N818 - read by people, and it is what it says
    """An expected failure: what failed, where its log lies, how to go on."""

    def __init__(self, what: str, *, log: Path | None = None, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.log = log
        self.hint = hint

    def report(self) -> str:
        lines = [f"failed: {self.what}"]
        if self.log is not None:
            lines += [f"  | {line}" for line in tail(self.log, 12)]
            lines.append(f"  log: {self.log}")
        if any(FULL in line for line in lines):
            lines.append(f"  free: {free_space()}")
        lines.append(f"  next: {self.hint or GO_ON}")
        return "\n".join(lines)


def free_space() -> str:
    """How much room there is where we write."""
    found = []
    for place in (paths.CACHE, paths.LOCAL, paths.RUN.parent):
        there = next(path for path in (place, *place.parents) if path.exists())
        found.append(f"{place} {shutil.disk_usage(there).free / 1e9:.1f} GB")
    return ", ".join(found)


def elapsed() -> float:
    return time.monotonic() - _started


def step(message: str) -> None:
    print(f"[{elapsed():6.1f}s] {message}", file=sys.stderr, flush=True)


@contextmanager
def heartbeat(what: str, log: Path | None = None, tell: Callable[[str], None] = step) -> Iterator[None]:
    """While the block runs, a line every ten seconds: how long it takes already, and the last words of its log."""
    began, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            words = "".join(tail(log, 1)).strip() if log else ""
            tell(f"{what}: {time.monotonic() - began:.0f} s so far{f' ({words[:70]})' if words else ''}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tail(path: Path, count: int) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-count:]
    except OSError:
        return []
