"""Runs in a pod: asks a chat endpoint without a pause until SIGTERM, and counts every request from the first one on.

    python3 -m kit.traffic http://assistant:8000/v1 assistant /prompts/prompts.json [clients] [max_tokens]

Clients keep their connection, as SDKs do; every other request streams. A request is lost when it gets anything but a
200, when its answer is not whole, or when the connection fails: nothing is asked again. One JSON line a second,
{"sent", "lost", "median_ms", "reasons", "final"}; the last one has final = true. Standard library only.
"""

import http.client
import json
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

PAUSE = 0.05  # seconds between an answer and the client's next question
TIMEOUT = 60.0  # seconds without a byte


@dataclass
class Tally:
    """What came of the requests; `latencies` in seconds."""

    sent: int = 0
    lost: int = 0
    reasons: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def line(self, *, final: bool) -> str:
        """What the other side reads."""
        recent = self.latencies[-200:]
        found = {
            "sent": self.sent,
            "lost": self.lost,
            "median_ms": round(1000 * statistics.median(recent), 1) if recent else None,
            "reasons": self.reasons[-5:],
            "final": final,
        }
        return json.dumps(found)


class Client:
    """One kept connection; after a failure the next request opens a new one."""

    def __init__(self, url: str, model: str, max_tokens: int) -> None:
        parts = urlsplit(url)
        self.path, self.model, self.max_tokens = f"{parts.path}/chat/completions", model, max_tokens
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=TIMEOUT)

    def ask(self, prompt: str, *, stream: bool) -> None:
        """One request. Raises OSError, http.client.HTTPException or ValueError when it is lost."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream": stream,
        }
        try:
            self.connection.request("POST", self.path, json.dumps(body), {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
            raw = answer.read()
            check(answer.status, raw, stream=stream)
        except BaseException:
            self.connection.close()
            raise


def check(status: int, raw: bytes, *, stream: bool) -> None:
    """Raises ValueError unless this is a whole answer."""
    if status != 200:
        raise ValueError(f"status {status}: {raw[:200]!r}")
    if stream:
        if not raw.rstrip().endswith(b"data: [DONE]"):
            raise ValueError(f"stream cut after {len(raw)} bytes")
        return
    try:
        whole = bool(json.loads(raw)["choices"][0]["finish_reason"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"not an answer: {raw[:200]!r}") from None
    if not whole:
        raise ValueError("no finish_reason")


class Traffic:
    """Closed-loop clients in threads: `with Traffic(url, model, prompts) as t: ...; t.tally`."""

    def __init__(self, url: str, model: str, prompts: list[str], *, clients: int = 2, max_tokens: int = 40) -> None:
        self.prompts = prompts
        self.clients = [Client(url, model, max_tokens) for _ in range(clients)]
        self.tally = Tally()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(clients)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=TIMEOUT + 5)

    def _run(self, index: int) -> None:
        turn = 0
        while not self._stop.is_set():
            prompt = self.prompts[(index + turn * len(self.clients)) % len(self.prompts)]
            began = time.monotonic()
            try:
                self.clients[index].ask(prompt, stream=turn % 2 == 1)
                reason = ""
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}"
            turn += 1
            with self._lock:
                self.tally.sent += 1
                if reason:
                    self.tally.lost += 1
                    self.tally.reasons = [*self.tally.reasons, reason][-20:]
                else:
                    self.tally.latencies = [*self.tally.latencies[-999:], time.monotonic() - began]
            self._stop.wait(PAUSE)


def main(url: str, model: str, prompts: str, clients: str = "2", max_tokens: str = "40") -> None:
    """Ask until told to stop."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    texts: list[str] = json.loads(Path(prompts).read_text(encoding="utf-8"))
    with Traffic(url, model, texts, clients=int(clients), max_tokens=int(max_tokens)) as traffic:
        while not stop.wait(1):
            print(traffic.tally.line(final=False), flush=True)
    print(traffic.tally.line(final=True), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
