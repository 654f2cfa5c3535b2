"""What an answer's text comes through, from the engine process to those who send it on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slmops_server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that arrived. `tokens` counts all so far; with `finish` come the times of CLOCK_MONOTONIC, gaps in us."""

    text: str
    tokens: int
    finish: str | None = None
    started: float = 0.0  # when it got its slot
    first: float = 0.0
    last: float = 0.0
    gaps: tuple[int, ...] = ()
    cached: int = 0  # prompt tokens that did not have to be computed
    scores: tuple[list[Any], list[Any]] | None = None  # as the worker tells them
    choice: int = 0


class Stream:
    """One running answer as the front sees it."""

    def __init__(self, grammar_param: str | None = None) -> None:
        self.grammar_param = grammar_param
        self.numbers: dict[int, int] = {}  # the engine's jobs, and of which choice each is
        self._arrived: list[Delta] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Delta | ApiError) -> None:
        """Called by the supervisor."""
        if isinstance(item, Delta):
            self._arrived.append(item)
        else:
            self._error = item
        self.ring()

    def ring(self) -> None:
        """Whoever waits looks again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, check: Callable[[], None] = lambda: None) -> list[Delta]:
        """All that has arrived, at least one. ApiError when the engine failed.

        check: called before each look; what it raises ends the wait. No task and no timer, as this is for every token.
        """
        while True:
            check()
            if self._arrived:
                arrived, self._arrived = self._arrived, []
                return arrived
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
