"""Grammars compiled beside the engine loop, so that a large one holds up nobody but its own request."""

import contextlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from slmops_server.guide import BadGrammarError, Guides, MatcherGuide

THREADS = 2  # so that one slow grammar does not hold up the small ones
SECONDS = 10.0  # for one grammar, and as long again for a thread to be free


class CrowdedError(Exception):
    """No thread was free for the grammar in time: it may be as good as any."""


class Compiler:
    """Driven by one thread, which may wait until `wake` is readable: then `done` has something to tell."""

    def __init__(self, guides: Guides, clock: Callable[[], float] = time.monotonic) -> None:
        self.wake, self._bell = socket.socketpair()
        self.wake.setblocking(False)
        self._bell.setblocking(False)
        self._guides, self._clock = guides, clock
        self._pool = ThreadPoolExecutor(THREADS, "grammar")
        self._open: dict[int, tuple[tuple[str, str], float]] = {}  # the grammar, and since when it is waited for
        self._begun: dict[tuple[str, str], float] = {}  # when a thread took it up; written by that thread
        self._running: dict[tuple[str, str], Future[MatcherGuide]] = {}  # once for all who wait for the same

    def known(self, kind: str, text: str) -> MatcherGuide | None:
        """See Guides."""
        return self._guides.known(kind, text)

    def start(self, number: int, kind: str, text: str) -> None:
        """Compile; `done` tells the outcome under that number."""
        self._open[number] = (kind, text), self._clock()
        if (kind, text) not in self._running:
            self._running[kind, text] = future = self._pool.submit(self._compile, kind, text)
            future.add_done_callback(self.ring)

    def _compile(self, kind: str, text: str) -> MatcherGuide:
        self._begun[kind, text] = self._clock()
        return self._guides.new(kind, text)

    def cancel(self, number: int) -> None:
        """Forget it. What runs is run to its end: a thread cannot be ended."""
        grammar, _ = self._open.pop(number, (None, 0.0))
        if grammar is None or any(grammar == other for other, _ in self._open.values()):
            return
        if grammar in self._running and self._running[grammar].cancel():
            del self._running[grammar]

    def done(self) -> list[tuple[int, MatcherGuide | BadGrammarError | BaseException]]:
        """What was compiled, could not be or took too long (BadGrammarError: its own fault), or found no thread."""
        with contextlib.suppress(BlockingIOError):
            while self.wake.recv(1024):
                pass
        # looked at once: what ends meanwhile has rung, and is told the next time
        ended = {grammar: future for grammar, future in self._running.items() if future.done()}
        told: list[tuple[int, MatcherGuide | BadGrammarError | BaseException]] = []
        for number, (grammar, since) in self._open.items():
            begun = self._begun.get(grammar)
            if grammar in ended:
                told.append((number, ended[grammar].exception() or ended[grammar].result().copy()))
            elif self._clock() <= max(since, begun or since) + SECONDS:
                continue
            elif begun is None:
                told.append((number, CrowdedError("Other grammars are being compiled.")))
            else:
                told.append((number, BadGrammarError(f"compiling it takes longer than {SECONDS:g} seconds")))
        for grammar in ended:
            del self._running[grammar]
            self._begun.pop(grammar, None)
        for number, _ in told:
            self.cancel(number)
        return told

    def ring(self, _future: Future[Any]) -> None:
        """End the wait for `wake`, from any thread, for something else that is done too."""
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._bell.send(b"!")
