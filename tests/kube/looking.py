"""A part of Kubernetes that is not there, played by a thread."""

import threading
from typing import Self

from tests.kube.api import Api


class Looking:
    """A thread that looks again and again and does what is due; `with` starts and stops it, and raises what it met."""

    def __init__(self, api: Api) -> None:
        self.api = Api(api.access, api.namespace)  # one connection a thread
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self.end()
        if self._error:
            raise self._error

    def look(self) -> None:
        """One look at the world."""
        raise NotImplementedError

    def end(self) -> None:
        """After the last look."""

    def _work(self) -> None:
        try:
            while not self._stop.wait(0.05):
                self.look()
        except Exception as error:  # noqa: BLE001  # shown to the test
            self._error = error
