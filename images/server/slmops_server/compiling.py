"""Grammars compiled beside the engine loop, so that a large one holds up nobody but its own request."""

import contextlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from slmops_server.guide import BadGrammarError, Guides, MatcherGuide

THREADS = 2  # so that one slow grammar does not hold up the small ones
SECONDS = 10.0  # for one grammar, its wait for a thread included


class Compiler:
    """Driven by one thread, which may wait until `wake` is readable: then `done` has something to tell."""

    def __init__(self, guides: Guides, clock: Callable[[], float] = time.monotonic) -> None:
        self.wake, self._bell = socket.socketpair()
        self.wake.setblocking(False)
        self._bell.setblocking(False)
        self._guides, self._clock = guides, clock
        self._pool = ThreadPoolExecutor(THREADS, "grammar")
        self._open: dict[int, tuple[Future[MatcherGuide], float]] = {}

    def known(self, kind: str, text: str) -> MatcherGuide | None:
        """See Guides."""
        return self._guides.known(kind, text)

    def start(self, number: int, kind: str, text: str) -> None:
        """Compile; `done` tells the outcome under that number."""
        future = self._pool.submit(self._guides.new, kind, text)
        self._open[number] = future, self._clock() + SECONDS
        future.add_done_callback(self._ring)

    def cancel(self, number: int) -> None:
        """Forget it. What runs is run to its end: a thread cannot be ended."""
        if number in self._open:
            self._open.pop(number)[0].cancel()

    def done(self) -> list[tuple[int, MatcherGuide | BadGrammarError | BaseException]]:
        """What was compiled, could not be (BadGrammarError: the grammar's fault), or took too long."""
        with contextlib.suppress(BlockingIOError):
            while self.wake.recv(1024):
                pass
        told: list[tuple[int, MatcherGuide | BadGrammarError | BaseException]] = []
        for number, (future, end) in self._open.items():
            if future.done():
                told.append((number, future.exception() or future.result()))
            elif self._clock() > end:
                told.append((number, BadGrammarError(f"compiling it takes longer than {SECONDS:g} seconds")))
        for number, _ in told:
            self.cancel(number)
        return told

    def _ring(self, _future: Future[MatcherGuide]) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._bell.send(b"!")
