"""When which object is due: a keyed, deduplicating queue with delays and per-object backoff. Pure: time is handed in.

An object known here always has a next time, if only the resync's: a lost event costs minutes, not for ever.
"""

import heapq
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

COALESCE = 0.05  # seconds an event waits for others of the same object
RESYNC = 300.0  # seconds after which an object is looked at though nothing happened
BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0
AFTER_FAILURE = 1.0  # an event may cut a backoff short, but not below this


@dataclass
class _Item:
    due: float
    failures: int = 0
    floor: float = 0.0  # not before this time, after a failure
    running: bool = False
    again: bool = False  # poked while running


class Schedule(Generic[K]):
    """`jitter` gives numbers between -1 and 1; delays move by up to a fifth of themselves."""

    def __init__(self, jitter: Callable[[], float], *, resync: float = RESYNC) -> None:
        self._jitter, self._resync = jitter, resync
        self._items: dict[K, _Item] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._items)

    def poke(self, key: K, now: float) -> None:
        """Something happened to the object: look at it soon."""
        item = self._items.get(key)
        if item is None:
            self._items[key] = item = _Item(due=math.inf)
        if item.running:
            item.again = True
            return
        self._set(key, item, max(now + COALESCE, item.floor))

    def take(self, now: float) -> K | None:
        """Hand out an object that is due, longest first; None where none is. It stays out until done or failed."""
        self._drop_stale()
        if not self._heap or self._heap[0][0] > now:
            return None
        _, _, key = heapq.heappop(self._heap)
        item = self._items[key]
        item.running, item.again = True, False
        return key

    def done(self, key: K, now: float, after: float | None) -> None:
        """Give an object back after a good pass; it is due again `after` seconds later, never where that is inf."""
        item = self._items[key]
        item.running, item.failures, item.floor = False, 0, 0.0
        if item.again:
            self._set(key, item, now + COALESCE, later=True)
        elif after is not None and math.isinf(after):
            del self._items[key]
        else:
            resync = self._spread(self._resync)
            self._set(key, item, now + (resync if after is None else min(max(0.0, after), resync)), later=True)

    def failed(self, key: K, now: float) -> float:
        """Give an object back after a bad pass; returns the seconds until the next one."""
        item = self._items[key]
        item.running = False
        delay = self._spread(min(BACKOFF_FIRST * (1 << min(item.failures, 16)), BACKOFF_MOST))
        item.failures += 1
        item.floor = now + AFTER_FAILURE
        if item.again:
            delay = min(delay, AFTER_FAILURE)
        self._set(key, item, now + delay, later=True)
        return delay

    def wait(self, now: float) -> float | None:
        """Seconds until something is due; None where nothing ever is."""
        self._drop_stale()
        return max(0.0, self._heap[0][0] - now) if self._heap else None

    def depth(self, now: float) -> int:
        """How many objects are due and wait for a worker."""
        return sum(1 for item in self._items.values() if not item.running and item.due <= now)

    def oldest(self, now: float) -> float:
        """Seconds that the object waits which has waited longest; 0 where none does."""
        due = [item.due for item in self._items.values() if not item.running and item.due <= now]
        return now - min(due) if due else 0.0

    def _set(self, key: K, item: _Item, due: float, *, later: bool = False) -> None:
        if due < item.due or later:
            item.due = due
            heapq.heappush(self._heap, (due, next(self._numbers), key))

    def _drop_stale(self) -> None:
        while self._heap:
            due, _, key = self._heap[0]
            item = self._items.get(key)
            if item is not None and not item.running and item.due == due:
                return
            heapq.heappop(self._heap)

    def _spread(self, delay: float) -> float:
        return delay * (1 + 0.2 * self._jitter())
