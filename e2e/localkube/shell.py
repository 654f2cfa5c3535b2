"""Running other programs: quiet when they succeed, their last words when they do not."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from localkube.say import Failure, heartbeat, step


def run(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    log: Path | None = None,
    timeout: float | None = None,
    doing: str = "",
    hint: str = "",
) -> str:
    """Run to success and return stdout; with `log`, all output goes to that file instead. Raises Failure.

    `doing` names what may take long: then a line tells every ten seconds that it goes on.
    """
    with heartbeat(doing, log) if doing else contextlib.nullcontext():
        result = attempt(*argv, env=env, cwd=cwd, stdin=stdin, log=log, timeout=timeout)
    if result.returncode:
        said = result.stderr or result.stdout or ""
        words = [f"{_name(argv)} ended with {result.returncode}", *said.strip().splitlines()[-6:]]
        raise Failure("\n  | ".join(words), log=log, hint=hint)
    return result.stdout or ""


def attempt(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    log: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run and let the caller judge; a missing program or a timeout reads as failure."""
    words = [str(a) for a in argv]
    try:
        with _output(log) as out:
            return subprocess.run(
                words, env=_env(env), cwd=cwd, input=stdin, text=True, stdout=out, stderr=out, timeout=timeout,
                close_fds=False,
            )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired) as problem:
        return subprocess.CompletedProcess(words, 127, "", str(problem))


@contextmanager
def _output(log: Path | None) -> Iterator[IO[str] | int]:
    if log is None:
        yield subprocess.PIPE
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        yield out


def wait_for(what: str, ready: Callable[[], bool], *, seconds: float, log: Path | None = None, hint: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise Failure(f"{what} was not ready after {seconds:.0f} s", log=log, hint=hint)
        time.sleep(0.1)


@contextmanager
def locked(path: Path, *, inherited: bool = False) -> Iterator[None]:
    """Hold a lock file; says so when another process has it.

    Inherited: programs we run hold it too, so that if we are killed the next run waits for them to end.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as handle:
            os.set_inheritable(handle.fileno(), inherited)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                step(f"waiting for another run to finish ({path.name})")
                with heartbeat(f"waiting ({path.name})"):
                    fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever had it may have removed the file: then the lock is one that nobody else would see.
            if path.exists() and path.stat().st_ino == os.fstat(handle.fileno()).st_ino:
                yield
                return


def _env(extra: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if extra is None else {**os.environ, **extra}


def _name(argv: Sequence[str | Path]) -> str:
    return " ".join([Path(argv[0]).name, *(str(a) for a in argv[1:3])])
