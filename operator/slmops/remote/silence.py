"""Whom not to ask for a while: waiting for an answer takes a worker, and there are few of them."""

import threading


class Silence:
    """Addresses that let us wait; may be used from many threads. Times are those of one monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def keeps(self, address: str, now: float) -> bool:
        """Whether it let us wait within the last `seconds`."""
        with self._lock:
            self._until = {key: until for key, until in self._until.items() if until > now}
            return address in self._until

    def begin(self, address: str, now: float) -> None:
        """Note that it let us wait."""
        with self._lock:
            self._until[address] = now + self._seconds
