"""A real HTTP server that speaks /v1/chat/completions, answers the tiny task, and misbehaves by script."""

import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

Script = Callable[[int, str, dict[str, Any]], "Fault | str | None"]


class Fault(NamedTuple):
    """What goes out instead of an answer. `status` 0: the connection is cut; `wait`: an event before it goes on."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = MappingProxyType({})
    wait: threading.Event | None = None


def answer(text: str | None, finish: str = "stop", tokens: int = 7) -> str:
    """A whole response."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": tokens}})


class FakeTeacher:
    """`script(number of the request from 1, question, body)` gives a Fault, or an answer's text, or None for `reply`.

    asked     how often each question came in
    requests  their bodies, in order
    sent      their headers, in order, by lower-case name
    seen      is told each request's path and query
    base      the path before /chat/completions
    `tls`: a folder with server.crt and server.key.
    """

    def __init__(
        self,
        reply: Callable[[str], str],
        script: Script | None = None,
        port: int = 0,
        *,
        base: str = "/v1",
        tls: Path | None = None,
    ) -> None:
        self.reply, self.script = reply, script
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.sent: list[dict[str, str]] = []
        self.seen: Callable[[str], object] = lambda path: None
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self.changed = threading.Condition(self._lock)
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                teacher._answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that were killed on purpose

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "server.crt", tls / "server.key")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.base = base
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}{base}"

    def __enter__(self) -> Self:
        threading.Thread(target=lambda: self._server.serve_forever(0.02), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, requests: int, timeout: float = 60) -> None:
        """Block until so many requests have come in."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.requests) >= requests, timeout), len(self.requests)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        self.seen(handler.path)
        with self._lock:
            self.requests.append(body)
            self.sent.append({name.lower(): value for name, value in handler.headers.items()})
            self.asked[question] += 1
            number = len(self.requests)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.changed.notify_all()
        try:
            fault = self.script(number, question, body) if self.script else None
            if handler.path.partition("?")[0] != f"{self.base}/chat/completions":
                fault = Fault(404, "no such path")
            if not isinstance(fault, Fault):
                fault = Fault(body=answer(self.reply(question) if fault is None else fault))
            if fault.wait is not None:
                fault.wait.wait(60)
        finally:
            with self._lock:
                self._now -= 1
        if fault.status == 0:
            handler.close_connection = True
            return
        raw = fault.body.encode()
        handler.send_response(fault.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **fault.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)
