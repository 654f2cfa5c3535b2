"""HAProxy's runtime API: commands over its unix socket, and what its counters say."""

import csv
import io
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from slmops_router.routes import Routes

TIMEOUT = 5.0  # seconds for one command
PASSED = ("L7OK", "L7OKC")
CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx", "other")


class RuntimeApiError(Exception):
    """HAProxy did not answer, or refused a command."""


def ask(path: Path, command: str) -> str:
    """Send one command; its output. Raises RuntimeApiError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(str(path))
            connection.sendall(command.encode() + b"\n")
            chunks = []
            while chunk := connection.recv(65536):
                chunks.append(chunk)
    except OSError as error:
        raise RuntimeApiError(f"HAProxy does not answer: {error}") from error
    return b"".join(chunks).decode(errors="replace").strip()


def order(path: Path, command: str) -> None:
    """Send a command that says nothing when it worked. Raises RuntimeApiError."""
    said = ask(path, command)
    if said:
        raise RuntimeApiError(f"HAProxy refused {command.splitlines()[0]!r}: {said}")


@dataclass(frozen=True)
class Running:
    """The process that answers on the socket."""

    fingerprint: str  # of its configuration
    pid: str


def running(path: Path) -> Running:
    """Who answers on the socket. Raises RuntimeApiError."""
    said = dict(line.split(": ", 1) for line in ask(path, "show info").splitlines() if ": " in line)
    return Running(said.get("description", ""), said.get("Pid", ""))


def resolved(path: Path) -> bool:
    """Whether a nameserver has answered, be it that there is no such name. Raises RuntimeApiError."""
    found = re.findall(r"^\s*(?:valid|nx|any_err):\s*(\d+)", ask(path, "show resolvers dns"), re.MULTILINE)
    return any(int(count) for count in found)


def close(path: Path, frontend: str) -> int:
    """Refuse new connections, and let the next answer on each of the others say that it is the last; how many are left.

    To be disabled comes first: one that is only shut down keeps its socket, where clients would wait in vain. Raises
    RuntimeApiError.
    """
    if _frontend(path, frontend)["status"] != "STOP":
        said = ask(path, f"disable frontend {frontend}")
        if said and "already disabled" not in said:
            raise RuntimeApiError(f"HAProxy did not disable the frontend: {said}")
        order(path, f"shutdown frontend {frontend}")
    return int(_frontend(path, frontend)["scur"])


def workers(master: Path) -> int:
    """How many processes still have connections, the newest included. Raises RuntimeApiError."""
    found = re.findall(r"^\d+\s+worker\b", ask(master, "show proc\nquit"), re.MULTILINE)
    if not found:
        raise RuntimeApiError("HAProxy's master names no process.")
    return len(found)


def replace_map(path: Path, name: Path, content: str) -> None:
    """Swap the whole content of a map at once: no request sees half of it. Raises RuntimeApiError."""
    said = ask(path, f"prepare map {name}")
    version = re.search(r"New version created: (\d+)", said)
    if version is None:
        raise RuntimeApiError(f"HAProxy refused to prepare the map: {said}")
    if content:
        order(path, f"add map @{version.group(1)} {name} <<\n{content}")
    order(path, f"commit map @{version.group(1)} {name}")


@dataclass
class Counts:
    """Counters of one revision."""

    responses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    aborted: int = 0  # answers that a server cut off
    chosen: int = 0  # of the turns, those that were its

    def plus(self, other: "Counts", sign: int = 1) -> "Counts":
        """Sum, or difference."""
        return Counts(
            {c: self.responses[c] + sign * other.responses[c] for c in CLASSES},
            self.aborted + sign * other.aborted,
            self.chosen + sign * other.chosen,
        )


@dataclass(frozen=True)
class Seen:
    """What HAProxy says at one moment."""

    counts: dict[str, Counts]  # by revision
    turns: int  # requests without a conversation, while every revision with a share had pods
    up: dict[str, int]  # servers that passed their check, 0 before the upper level knows it too


def seen(path: Path, routes: Routes) -> Seen:
    """Counters and healthy servers by revision. Raises RuntimeApiError."""
    names = [r.revision for r in routes.revisions]
    counts = {name: Counts() for name in names}
    up = dict.fromkeys(names, 0)
    open_ = dict.fromkeys(names, False)
    turns = 0
    for row in _stat(path):
        proxy, server = row["pxname"], row["svname"]
        if proxy in counts and server == "BACKEND":
            counts[proxy].responses = {c: int(row[f"hrsp_{c}"] or 0) for c in CLASSES}
            counts[proxy].aborted = int(row["srv_abrt"] or 0)
        elif proxy == "split" and server == "BACKEND":
            turns = int(row["stot"] or 0)
        elif proxy == "split" and server in counts:
            counts[server].chosen = int(row["stot"] or 0)
            open_[server] = _passed(row)
        elif proxy in up and server not in ("BACKEND", "FRONTEND"):
            up[proxy] += _passed(row)
    return Seen(counts, turns, {name: up[name] if open_[name] else 0 for name in names})


def _stat(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(ask(path, "show stat").removeprefix("# "))))


def _frontend(path: Path, name: str) -> dict[str, str]:
    for row in _stat(path):
        if row["pxname"] == name and row["svname"] == "FRONTEND":
            return row
    raise RuntimeApiError(f"HAProxy has no frontend {name}.")


def _passed(row: dict[str, str]) -> bool:
    """Up, and its last check that ended was good; a star marks a check that runs."""
    return row["status"].startswith("UP") and row["check_status"].removeprefix("* ") in PASSED
