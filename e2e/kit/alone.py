"""One at a time in a clone, or one would take the other's work away: a demo, tests on the local node, and what installs
or removes the chart below them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kit.kubectl import LOCAL

LOCK = LOCAL / "demo.lock"


class BusyError(Exception):
    """Another run is at work; the message says which one and what to do."""


@contextmanager
def alone(doing: str) -> Iterator[None]:
    """Hold the clone's lock while the block runs; raises BusyError at once if it is held.

    It goes with the process, whatever that has started.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise BusyError(f"In this clone {holder} is at work. Wait for its end, or end it with Ctrl-C") from None
        file.truncate(0)
        file.write(f"{doing} (pid {os.getpid()})\n")
        file.flush()
        yield
