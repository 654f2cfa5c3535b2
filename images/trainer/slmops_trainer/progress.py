"""What the pod tells while it runs: `/progress` for the operator, `/metrics` for Prometheus, on one port."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from slmops.api.keys import METRICS_PORT
from slmops.api.meta import STAGE_STARTING, Progress

MESSAGE_MAX = 512
CONNECTIONS = 16  # at the same time
CONNECTION_SECONDS = 10.0  # of each, however slowly it speaks


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run and its share of the whole run's time, in any unit."""

    name: str
    weight: float


class Board:
    """Thread-safe state of the run. `clock` gives seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: tuple[Stage, ...] = ()
        self._progress = Progress(percent=0, stage=STAGE_STARTING)
        self._stage_began = (clock(), 0)
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._percent = Gauge("slmops_run_percent", "Progress of the run, 0 to 100.", registry=self.registry)
        self._live = Gauge(
            "slmops_run_live",
            "Latest value: loss, learning_rate, tokens_per_second, step, ...",
            ["name"],
            registry=self.registry,
        )
        self._result = Gauge("slmops_run_result", "What the run measured, by name.", ["name"], registry=self.registry)

    def plan(self, stages: Sequence[Stage]) -> None:
        """Say which stages will come, in order, so that percent and ETA speak of the whole run."""
        with self._lock:
            self._stages = tuple(stages)

    def report(self, stage: str, step: int, total: int, message: str = "", percent: int | None = None) -> None:
        """`step` of `total` of `stage` is done. `percent` of the whole run follows from the plan unless given."""
        now = self._clock()
        with self._lock:
            if stage != self._progress.stage:
                self._stage_began = (now, step)
            share = min(1.0, step / total) if total > 0 else 0.0
            whole = self._whole(stage, share) if percent is None else percent
            # A resumed or repeated stage must not make the bar run backwards; 100 is the operator's to give.
            whole = min(99, max(whole, self._progress.percent))
            self._progress = Progress(
                percent=whole,
                stage=stage[:64],
                step=step,
                total_steps=total,
                eta_seconds=self._eta(stage, step, total, now),
                message=message[:MESSAGE_MAX],
            )
            self._percent.set(whole)

    def live(self, **values: float) -> None:
        """Values that change while the run goes on; gauges only."""
        for name, value in values.items():
            self._live.labels(name).set(value)

    def result(self, name: str, value: float) -> None:
        """A value the run ends with."""
        self._result.labels(name).set(value)

    @property
    def progress(self) -> Progress:
        """What `/progress` answers now."""
        with self._lock:
            return self._progress

    def _whole(self, stage: str, share: float) -> int:
        sum_all = sum(entry.weight for entry in self._stages)
        before = 0.0
        for entry in self._stages:
            if entry.name == stage:
                return int(100 * (before + share * entry.weight) / sum_all)
            before += entry.weight
        return int(100 * share) if not self._stages else self._progress.percent

    def _eta(self, stage: str, step: int, total: int, now: float) -> int | None:
        """Rest of this stage at its own pace, and the later stages at the pace that its weight implies."""
        began, first = self._stage_began
        if step <= first or total <= 0:
            return None
        whole_stage = (now - began) / (step - first) * total
        names = [entry.name for entry in self._stages]
        later = 0.0
        if stage in names:
            at = names.index(stage)
            weight = self._stages[at].weight
            later = whole_stage * sum(entry.weight for entry in self._stages[at + 1 :]) / weight if weight else 0.0
        return int(whole_stage * (1 - step / total) + later)


class _Server(ThreadingHTTPServer):
    """A courtesy of the run, which no client may end by the files and threads of many connections.

    Where there are too many, the oldest ends: who holds many can so keep nobody else away.

    Keeps quiet about clients that hang up: a busy pod answers late, and its log is for people.
    """

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, *arguments: Any) -> None:
        self._since: dict[socket.socket, float] = {}  # each connection, and when it came
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own."""
        for oldest in list(self._since)[: max(0, len(self._since) - CONNECTIONS + 1)]:
            self._end(oldest)
        self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Break off, twice a second, what takes too long."""
        before = time.monotonic() - CONNECTION_SECONDS
        for request, since in self._since.copy().items():
            if since < before:
                self._end(request)

    def _end(self, request: socket.socket) -> None:
        """Make its thread close it."""
        self._since.pop(request, None)
        with suppress(OSError):  # closed meanwhile
            request.shutdown(socket.SHUT_RDWR)

    def server_bind(self) -> None:
        """One socket for both families."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the trace of what is not the client's doing."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def serve(board: Board, port: int = METRICS_PORT) -> ThreadingHTTPServer:
    """Answer `/progress` and `/metrics` from a thread until the process ends; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        """Two read-only pages."""

        def do_GET(self) -> None:
            """Answer one request."""
            if self.path == "/progress":
                body, kind = (
                    board.progress.model_dump_json(by_alias=True, exclude_none=True).encode(),
                    "application/json",
                )
            elif self.path == "/metrics":
                body, kind = generate_latest(board.registry), CONTENT_TYPE_LATEST
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
            """Say nothing: probes would fill the log."""

    server = _Server(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="progress", daemon=True).start()
    return server
