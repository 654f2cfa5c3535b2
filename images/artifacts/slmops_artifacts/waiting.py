"""How a transfer waits for a store that is away: quietly, or as the caller says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import ArtifactError

Wait = Callable[[ArtifactError, float], None]
"""Waits so many seconds because of that failure."""


def _sleep(failure: ArtifactError, seconds: float) -> None:  # noqa: ARG001  # the signature of Wait
    time.sleep(seconds)


_wait: ContextVar[Wait] = ContextVar("wait", default=_sleep)


@contextmanager
def waiting(wait: Wait) -> Iterator[None]:
    """Let `wait` do the waiting of every transfer in the block. It may tell of the failure; what it raises ends it."""
    before = _wait.set(wait)
    try:
        yield
    finally:
        _wait.reset(before)


def hold(failure: ArtifactError, seconds: float) -> None:
    """Wait before the next try."""
    _wait.get()(failure, seconds)
