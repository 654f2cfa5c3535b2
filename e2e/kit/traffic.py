"""Continuous requests against an OpenAI-compatible endpoint, counted one by one: nothing may be lost.

A request is lost when it gets no 200, no whole answer, or a broken stream. Standard library only.
"""

import json
import threading
import time
import urllib.request
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What came of the requests; `latencies` in seconds, `models` counts answers by served fingerprint."""

    sent: int = 0
    lost: int = 0
    reasons: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


class Traffic:
    """Closed-loop clients in threads: `with Traffic(url, model, prompts) as t: ...; t.tally`."""

    def __init__(
        self, url: str, model: str, prompts: list[str], *, clients: int = 2, pause: float = 0.05, max_tokens: int = 40
    ) -> None:
        self.url, self.model, self.prompts = url, model, prompts
        self.clients, self.pause, self.max_tokens = clients, pause, max_tokens
        self.tally = Tally()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Traffic":
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _client(self, index: int) -> None:
        turn = index
        while not self._stop.is_set():
            prompt = self.prompts[turn % len(self.prompts)]
            stream = turn % 2 == 1
            turn += self.clients
            began = time.monotonic()
            try:
                self._ask(prompt, stream=stream)
                reason = ""
            except Exception as error:  # noqa: BLE001  # whatever went wrong, the request is lost and says why
                reason = f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}"
            with self._lock:
                self.tally.sent += 1
                if reason:
                    self.tally.lost += 1
                    self.tally.reasons = [*self.tally.reasons, reason][-20:]
                else:
                    self.tally.latencies = [*self.tally.latencies[-9999:], time.monotonic() - began]
            self._stop.wait(self.pause)

    def _ask(self, prompt: str, *, stream: bool) -> None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream": stream,
        }
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            raw = answer.read()
        if stream:
            if not raw.rstrip().endswith(b"data: [DONE]"):
                raise ValueError(f"stream cut after {len(raw)} bytes")
        elif not json.loads(raw)["choices"][0]["finish_reason"]:
            raise ValueError("no finish_reason")
