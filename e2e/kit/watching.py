"""What `kubectl get --watch` tells, with the moment of each event on this machine's clock: finer than whole seconds."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO

from kit.kubectl import Kubectl, Object

Event = tuple[float, Object]  # time.monotonic() at its arrival, the object


class Watch:
    """Events of one kind while the block runs: `with Watch(kube, "pods") as watch: ...; watch.events`."""

    def __init__(self, kube: Kubectl, kind: str) -> None:
        self.kube, self.kind = kube, kind
        self.events: list[Event] = []

    def __enter__(self) -> "Watch":
        words = [self.kube.program, "-n", self.kube.namespace, "get", self.kind, "-w", "-o", "json"]
        self._process = subprocess.Popen(words, env=self.kube.env, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._thread = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(10)

    def _read(self, stream: IO[str]) -> None:
        for each in objects(stream):
            self.events.append((time.monotonic(), each))


def objects(lines: Iterator[str] | IO[str]) -> Iterator[Object]:
    """JSON objects that follow one another, each spread over lines and ended by a line `}`."""
    text = ""
    for line in lines:
        text += line
        if line.rstrip() == "}":
            yield json.loads(text)
            text = ""
