"""HAProxy as a child process that is brought to the wanted routes.

New weights go through the runtime API: no reload, no connection is touched. Another set of revisions is a seamless
reload: the new process takes over the listening sockets and the servers' addresses and health, the old one ends its
answers. Whatever is set is also on disk, so that a restart can begin with it.
"""

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops_router import runtime
from slmops_router.haproxy_cfg import FRONT, Place, fingerprint, render, slots_map, takes_over
from slmops_router.routes import BadRoutesError, Routes
from slmops_router.runtime import Counts, RuntimeApiError, Seen

log = logging.getLogger(__name__)

START_SECONDS = 10.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Totals:
    """Counters that outlive HAProxy's processes."""

    counts: dict[str, Counts] = field(default_factory=dict)
    turns: int = 0


class Haproxy:
    """One HAProxy. All methods may be called from any thread; changes happen one after the other."""

    def __init__(self, place: Place, program: str = "haproxy", clock: Callable[[], float] = time.monotonic) -> None:
        self.place, self._program, self._clock = place, program, clock
        self._lock = threading.RLock()
        self._routes = Routes()
        self._late: dict[str, Routes] = {}  # by fingerprint: reloads that may still come
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = ""  # of the process that counts now
        self._before = Totals()  # counted by those before it
        self._last = Totals()  # counted in all when last looked
        self._base = Totals()  # counted when the epoch began
        self._began = clock()
        self._open = False  # whether it was ready once
        self._ending = False  # whether it was told to stop

    @property
    def routes(self) -> Routes:
        """The routes that are in force."""
        return self._routes

    def start(self, routes: Routes) -> None:
        """Start the process with these routes. Raises RuntimeApiError, BadRoutesError."""
        with self._lock:
            self.place.folder.mkdir(parents=True, exist_ok=True)
            self.place.state.write_text("1\n")  # nothing known: just the format's version
            self._write(routes)
            self._process = subprocess.Popen(
                [self._program, "-W", "-db", "-S", f"{self.place.master},mode,600", "-f", str(self._config)],
                cwd=self.place.folder,
            )
            self._await(routes)
            self._routes = routes

    def set(self, routes: Routes) -> None:
        """Bring HAProxy to these routes; it has them when this returns. Raises RuntimeApiError, BadRoutesError."""
        with self._lock:
            if self._runs(routes):
                self._reweigh(routes)
                _, begun = self._look(routes)
            else:
                begun = self._reload(routes)
            if routes.epoch != self._routes.epoch:
                self._base = begun
            self._routes = routes
            self._remember(routes)

    def observe(self) -> dict[str, Any]:
        """Routes in force, and by revision what was answered since the epoch began.

        Raises RuntimeApiError, BadRoutesError.
        """
        with self._lock:
            self._settle()
            now, total = self._look(self._routes)
            revisions = {}
            for revision in self._routes.revisions:
                name = revision.revision
                since = total.counts[name].plus(self._base.counts.get(name, Counts()), -1)
                revisions[name] = {
                    "weight": revision.weight,
                    "ready": now.up[name],
                    "requests": sum(n for kind, n in since.responses.items() if kind != "other"),  # LATE is no answer
                    "responses": since.responses,
                    "aborted": since.aborted,
                    "chosen": since.chosen,
                }
            turns = total.turns - self._base.turns
            return {
                "routes": self._routes.dump(),
                "epoch": self._routes.epoch,
                "turns": turns,
                "revisions": revisions,
            }

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def ready(self) -> bool:
        """Whether requests may come. A fresh one first has to reach a pod of every revision that gets any.

        From then on pods come and go without it: what none of them answers is answered here. It waits for them for a
        while only, for there may be none; but for DNS as long as it takes, for until then it knows of none.
        """
        try:
            if self._open:
                runtime.running(self.place.socket)
                return True
            up = runtime.seen(self.place.socket, self._routes).up
            reached = all(up[r.revision] for r in self._routes.revisions if r.weight)
            late = self._clock() - self._began > self.place.reach_seconds
            self._open = reached or (late and runtime.resolved(self.place.socket))
        except RuntimeApiError:
            return False
        return self._open

    def drain(self) -> None:
        """Take no new connections, and end with the last one. To be called again and again until it has ended.

        A soft stop alone would also close the inner sockets at once, and a client that keeps its connection may send
        one more request through them: its answer tells it that the connection ends. Processes before the last reload
        need these sockets too.
        """
        assert self._process is not None
        with self._lock:
            try:
                left = runtime.close(self.place.socket, FRONT)
                others = runtime.workers(self.place.master) - 1
            except RuntimeApiError as error:
                if self.alive() and not self._ending:
                    log.warning("Cannot drain yet error=%s", error)
                return
            if not left and not others:
                self._process.send_signal(signal.SIGUSR1)
                self._ending = True

    def stop(self) -> None:
        """End at once."""
        if self._process is not None and self.alive():
            self._process.terminate()
            self._process.wait(10)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, None where it still runs after that time."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @property
    def _config(self) -> Path:
        return self.place.folder / "haproxy.cfg"

    @property
    def saved(self) -> Path:
        """The file of the routes set last, also by a process before this one on the same folder."""
        return self.place.folder / "routes.json"

    def _remember(self, routes: Routes) -> None:
        _replace(self.saved, json.dumps(routes.dump()))

    def _reweigh(self, routes: Routes) -> None:
        path = self.place.socket
        content = slots_map(routes)
        for revision in routes.revisions:
            weight = takes_over(routes, revision)
            for backend in ("split", "aside"):
                runtime.order(path, f"set server {backend}/{revision.revision} weight {weight}")
        runtime.replace_map(path, self.place.slots, content)
        self._write(routes)

    def _reload(self, routes: Routes) -> Totals:
        """Reload into another set of revisions; what had been counted until then.

        Where that takes longer than it is waited for, the files stay the new ones: a late process finds no mix.
        """
        assert self._process is not None
        _, counted = self._look(self._routes)
        _replace(self.place.state, runtime.ask(self.place.socket, "show servers state") + "\n")
        self._write(routes)
        self._late[fingerprint(routes)] = routes
        self._process.send_signal(signal.SIGUSR2)
        self._await(routes)
        self._late = {}
        return counted

    def _settle(self) -> None:
        """Where a reload came later than it was waited for, its routes are in force."""
        found = runtime.running(self.place.socket).fingerprint
        if found != fingerprint(self._routes):
            if found not in self._late:
                raise RuntimeApiError("HAProxy runs routes that it was not given.")
            log.info("Reloaded late")
            self.set(self._late[found])

    def _write(self, routes: Routes) -> None:
        """Put configuration and map on disk, checked. Raises BadRoutesError."""
        fresh = self._config.with_suffix(".new")
        _replace(self.place.slots, slots_map(routes))
        fresh.write_text(render(routes, self.place))
        done = subprocess.run(
            [self._program, "-c", "-q", "-f", str(fresh)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BadRoutesError(f"HAProxy refuses the configuration: {done.stderr.strip()}")
        os.replace(fresh, self._config)  # noqa: PTH105

    def _await(self, routes: Routes) -> None:
        end = self._clock() + START_SECONDS
        while True:
            try:
                if self._runs(routes):
                    return
                problem = "it still runs the old configuration"
            except RuntimeApiError as error:
                problem = str(error)
            if not self.alive() or self._clock() > end:
                raise RuntimeApiError(f"HAProxy did not take the configuration: {problem}")
            time.sleep(POLL_SECONDS)

    def _runs(self, routes: Routes) -> bool:
        return runtime.running(self.place.socket).fingerprint == fingerprint(routes)

    def _look(self, routes: Routes) -> tuple[Seen, Totals]:
        """What HAProxy says now, and with it what its processes counted in all."""
        pid = runtime.running(self.place.socket).pid
        now = runtime.seen(self.place.socket, routes)
        if pid != self._pid:  # it counts from zero
            self._pid, self._before = pid, self._last
        before = self._before
        counts = {name: one.plus(before.counts.get(name, Counts())) for name, one in now.counts.items()}
        self._last = Totals(counts, now.turns + before.turns)
        return now, self._last


def _replace(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old or the new content."""
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(content)
    fresh.replace(path)
