"""Process 1 of the router's container: starts HAProxy and the agent, drains on SIGTERM."""

import argparse
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from slmops_router.agent import Agent
from slmops_router.control import Haproxy
from slmops_router.haproxy_cfg import Place
from slmops_router.routes import BadRoutesError, Routes, parse
from slmops_router.runtime import RuntimeApiError

log = logging.getLogger(__name__)

ENV_TOKEN = "SLMOPS_ROUTER_TOKEN"  # noqa: S105  # the name of a variable
THREADS_MAX = 4
FILES_MAX = 1_048_576


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or HAProxy's end: 0 after a drain, 1 where HAProxy ended by itself, 2 on wrong usage."""
    args = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    token = os.environ.get(ENV_TOKEN, "")
    if len(token) < 16:
        print(f"{ENV_TOKEN} must hold the agent's token, at least 16 characters.", file=sys.stderr)
        return 2
    nameservers, search = resolver(args.resolv_conf)
    haproxy = Haproxy(
        Place(
            folder=args.folder,
            port=args.port,
            metrics_port=args.metrics_port,
            ipv6=socket.has_dualstack_ipv6(),
            nameservers=(args.nameserver,) if args.nameserver else nameservers,
            search=search,
            reach_seconds=args.reach_seconds,
            threads=min(THREADS_MAX, len(os.sched_getaffinity(0))),
            files=open_files(),
        ),
        args.haproxy,
    )
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    try:
        haproxy.start(newest(haproxy.saved, args.routes))
    except (BadRoutesError, RuntimeApiError) as error:
        print(f"Could not start: {error}", file=sys.stderr)
        haproxy.stop()
        return 1
    agent = Agent(("", args.agent_port), haproxy, token)
    threading.Thread(target=agent.serve_forever, daemon=True).start()
    log.info("Started port=%d agent_port=%d", args.port, args.agent_port)
    return _watch(haproxy, agent, told, args.drain_seconds)


def _watch(haproxy: Haproxy, agent: Agent, told: threading.Event, drain_seconds: float) -> int:
    while not told.wait(0.5):
        if not haproxy.alive():
            log.error("HAProxy ended by itself code=%s", haproxy.wait(0))
            return 1
    # Still serving for a while: the cluster needs a moment to send new connections elsewhere.
    log.info("Draining seconds=%s", drain_seconds)
    agent.draining = True
    told.clear()
    told.wait(drain_seconds)
    while haproxy.wait(0.5) is None:
        if told.is_set():
            log.warning("Told twice: ending with answers cut off")
            haproxy.stop()
        else:
            haproxy.drain()
    log.info("Ended")
    return 0


def open_files() -> int:
    """How many files a process may have open here; HAProxy raises its own limit up to that."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES_MAX if most == resource.RLIM_INFINITY else min(most, FILES_MAX)


def resolver(path: Path) -> tuple[tuple[str, ...], str]:
    """Read the nameservers as ip:port, and the first search domain: in a pod, that of the pod's own namespace."""
    servers: list[str] = []
    search = ""
    try:
        text = path.read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word == "nameserver" and rest:
            servers.append(f"[{rest[0]}]:53" if ":" in rest[0] else f"{rest[0]}:53")
        elif word == "search" and rest:
            search = rest[0].rstrip(".")
    return tuple(servers), search


def newest(saved: Path, mounted: Path) -> Routes:
    """The routes to start with: those set last, or the mounted ConfigMap's where these came later; none without both.

    The kubelet writes the mounted file only when its content changes, so its time is that of the news: while a
    container waits for its restart, nobody sets routes, and those of before may name a revision that is gone. Raises
    BadRoutesError.
    """
    problem: BadRoutesError | None = None
    for path in sorted((saved, mounted), key=_written, reverse=True):
        try:
            return parse(path.read_bytes())
        except OSError:
            continue
        except BadRoutesError as error:
            problem = error
    if problem:
        raise problem
    return Routes()


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slmops-router", description=__doc__)
    parser.add_argument("--routes", type=Path, default=Path("/etc/slmops/router/routes.json"), help="routes at start")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/router"), help="sockets, map, state")  # noqa: S108
    parser.add_argument("--port", type=int, default=8000, help="of the API")
    parser.add_argument("--metrics-port", type=int, default=9090, help="of HAProxy's exporter")
    parser.add_argument("--agent-port", type=int, default=9091, help="of the agent")
    parser.add_argument("--resolv-conf", type=Path, default=Path("/etc/resolv.conf"), help="where to find DNS")
    parser.add_argument("--nameserver", default="", help="ip:port instead of those of resolv.conf")
    parser.add_argument("--haproxy", default="haproxy", help="the program")
    parser.add_argument("--reach-seconds", type=float, default=15.0, help="not ready before a pod is reached, so long")
    parser.add_argument("--drain-seconds", type=float, default=5.0, help="after SIGTERM, go on accepting for this long")
    return parser.parse_args(argv)
