"""Workers: they take objects from the schedule and run passes in threads, at most one at a time for an object."""

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from slmops.cluster.port import ClusterError, Key
from slmops.handlers.schedule import Schedule

log = logging.getLogger(__name__)

STALL_SECONDS = 120.0

PASS_SECONDS = 900.0  # every call of a pass has a time limit: a pass as long as this hangs

OnPass = Callable[[Key, float, bool], None]
"""Told of every pass: object, seconds, whether it failed."""
OnGone = Callable[[Key], None]
"""Told of every object that its pass did not find."""


class Work:
    """`run` does one pass (driver.Driver.run). All methods belong to the event loop's thread."""

    def __init__(
        self,
        run: Callable[[Key], float | None],
        schedule: Schedule[Key],
        *,
        workers: int,
        on_pass: OnPass = lambda _key, _seconds, _failed: None,
        on_gone: OnGone = lambda _key: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._run, self._schedule, self._workers, self._clock = run, schedule, workers, clock
        self._on_pass, self._on_gone = on_pass, on_gone
        self._begun: dict[Key, float] = {}  # of the passes in progress
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pass")
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._last_end = clock()

    def poke(self, key: Key) -> None:
        """Something happened to the object, or to what it depends on."""
        self._schedule.poke(key, self._clock())
        self._wake.set()

    def depth(self) -> int:
        """How many objects wait for a worker."""
        return self._schedule.depth(self._clock())

    def oldest(self) -> float:
        """Seconds that the object waits which has waited longest."""
        return self._schedule.oldest(self._clock())

    def stalled(self) -> bool:
        """Whether a pass hangs, or work waits while no pass has ended for two minutes. One that failed has ended."""
        now = self._clock()
        if any(now - began > PASS_SECONDS for began in self._begun.values()):
            return True
        return now - self._last_end > STALL_SECONDS and self.oldest() > STALL_SECONDS

    async def serve(self, stop: asyncio.Event) -> None:
        """Run passes until `stop` is set."""
        stopped = asyncio.create_task(stop.wait())
        while not stop.is_set():
            self._wake.clear()  # before looking: what comes while looking wakes again
            while len(self._running) < self._workers and (key := self._schedule.take(self._clock())) is not None:
                task = asyncio.create_task(self._pass(key))
                self._running.add(task)
                task.add_done_callback(self._ended)
            full = len(self._running) >= self._workers
            woken = asyncio.create_task(self._wake.wait())
            await asyncio.wait(
                (woken, stopped),
                timeout=None if full else self._schedule.wait(self._clock()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            woken.cancel()

    async def finish(self, seconds: float) -> bool:
        """Wait for the passes in progress, at most so long; False where some had not ended."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=seconds)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return not self._running

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()

    async def _pass(self, key: Key) -> None:
        began, failed, gone = self._clock(), False, False
        self._begun[key] = began
        where = {"kind": key.kind, "namespace": key.namespace, "object": key.name}
        try:
            after = await asyncio.get_running_loop().run_in_executor(self._pool, self._run, key)
            self._schedule.done(key, self._clock(), after)
            gone = after is not None and math.isinf(after)
        except ClusterError as error:
            failed = True
            delay = self._schedule.failed(key, self._clock())
            said = {"status": error.status, "error": error.message, "retry_seconds": round(delay, 1)}
            log.warning("Could not finish pass: API server", extra=where | said)
        except Exception:  # a bug: it must not take the others down
            failed = True
            delay = self._schedule.failed(key, self._clock())
            log.exception("Could not finish pass: bug", extra=where | {"retry_seconds": round(delay, 1)})
        finally:
            del self._begun[key]
            self._last_end = self._clock()
            self._on_pass(key, self._last_end - began, failed)
        if gone:
            self._on_gone(key)  # last, for it takes away what on_pass keeps of the object
