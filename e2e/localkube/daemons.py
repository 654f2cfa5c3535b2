"""Daemons: started in their own session, recorded by pid and start time, stopped by nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from localkube.say import Failure

# Of any distribution; a kind node has the same, in containers.
NODE_PROGRAMS = frozenset({"kubelet", "kube-proxy", "k3s", "rke2", "k0s", "kubelite"})


@dataclass(frozen=True)
class Daemon:
    name: str
    pid: int
    started: str
    program: str

    def alive(self) -> bool:
        # In the middle of exec the command line reads as empty.
        return start_time(self.pid) == self.started and _program(self.pid) in ("", self.program)


def start(name: str, argv: list[str], *, pids: Path, log: Path, env: Mapping[str, str] | None = None) -> Daemon:
    pids.mkdir(parents=True, exist_ok=True)
    log.mkdir(parents=True, exist_ok=True)
    with (log / f"{name}.log").open("w") as out:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            cwd="/",
            env=None if env is None else {**os.environ, **env},
        )
    started = start_time(process.pid)
    daemon = Daemon(name, process.pid, started, Path(argv[0]).name)
    (pids / f"{name}.pid").write_text(f"{daemon.pid} {daemon.started} {daemon.program}\n")
    return daemon


def recorded(pids: Path) -> dict[str, Daemon]:
    found = {}
    for path in sorted(pids.glob("*.pid")) if pids.is_dir() else []:
        words = path.read_text().split()
        if len(words) == 3 and words[0].isdigit():
            found[path.stem] = Daemon(path.stem, int(words[0]), words[1], words[2])
    return found


def check(daemon: Daemon, log: Path) -> None:
    """Fail at once when a daemon has ended, instead of waiting for a time limit."""
    if not daemon.alive():
        raise Failure(f"{daemon.name} ended during start", log=log / f"{daemon.name}.log")


def stop(daemons: Iterable[Daemon], *, grace: float = 5) -> None:
    """SIGTERM to all, then SIGKILL to those that stay."""
    left = [d for d in daemons if d.alive()]
    for daemon in left:
        _signal(daemon.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [d for d in left if d.alive()]
    for daemon in left:
        _signal(daemon.pid, signal.SIGKILL)
    wait_gone([d.pid for d in left])


def kill(pids: Iterable[int]) -> None:
    wanted = list(pids)
    for pid in wanted:
        _signal(pid, signal.SIGKILL)
    wait_gone(wanted)


def wait_gone(pids: Iterable[int], *, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while any(start_time(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)


def marked(marker: str, programs: frozenset[str]) -> list[int]:
    """Processes of these programs whose command line names `marker` (a path only we use)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        argv = _argv(int(entry.name))
        if argv and Path(argv[0]).name in programs and any(marker in word for word in argv[1:]):
            found.append(int(entry.name))
    return found


def kubernetes_beside() -> list[int]:
    """Processes of a Kubernetes node in this network namespace: its rules would be ours too, unlike a kind node's."""
    here = _network(os.getpid())
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if _program(pid) in NODE_PROGRAMS and _network(pid) == here]


def _network(pid: int) -> int:
    """The inode of a process's network namespace; 0 when it is gone."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return 0


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _argv(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _program(pid: int) -> str:
    argv = _argv(pid)
    return Path(argv[0]).name if argv else ""


def start_time(pid: int) -> str:
    """Start time in clock ticks since boot: with the pid it names a process for good. Empty for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
