"""One at a time in a clone, or one would take the other's work away: a demo, tests on the local node, and what installs
or removes the chart below them.

python -m kit.alone     fails where another one is at work
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kit.kubectl import LOCAL

LOCK = LOCAL / "demo.lock"


class BusyError(Exception):
    """Another run is at work; the message says which one and what to do."""


@contextmanager
def alone(doing: str) -> Iterator[int]:
    """Hold the clone's lock while the block runs; raises BusyError at once if it is held.

    It goes with the process, whatever that has started; a process that is given this file too keeps it as well.
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
        yield file.fileno()


def main() -> int:
    """The exit code."""
    try:
        with alone("a check"):
            return 0
    except BusyError as busy:
        print(f"did not start: {busy}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
