"""What stands around a router in a test: DNS, model servers that stream, clients that count, and the router itself."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-for-the-tests-of-the-router"


def eventually(check: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """The first true answer of `check`; it is asked again until then."""
    end = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < end, f"Not within {seconds} s: {what}"
        time.sleep(0.02)


_given = set[int]()  # what nobody listens on yet looks free


def free_port() -> int:
    """A port below those that the kernel gives to connections, so that it is still free when it is opened."""
    while True:
        port = random.randint(10_000, 30_000)
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            _given.add(port)
            return port


class Dns:
    """Answers A and AAAA queries from `records`: name -> addresses; what is not there is empty, as without pods."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.asked = Counter[str]()
        self.deaf = 0  # queries that get lost before one is answered
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                query, client = self._socket.recvfrom(4096)
            except OSError:
                return
            if self.deaf > 0:
                self.deaf -= 1
                continue
            with contextlib.suppress(OSError):  # closed in the meantime
                self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += query[at] + 1
        (kind,) = struct.unpack("!H", query[at + 1 : at + 3])
        name = ".".join(labels)
        self.asked[name] += 1
        family = {1: socket.AF_INET, 28: socket.AF_INET6}.get(kind)
        found = [
            socket.inet_pton(family, ip)
            for ip in self.records.get(name, [])
            if family and (":" in ip) == (family == socket.AF_INET6)
        ]
        head = query[:2] + struct.pack("!HHHHH", 0x8580, 1, len(found), 0, 0)
        records = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 1, len(ip)) + ip for ip in found)
        return head + query[12 : at + 5] + records

    def close(self) -> None:
        self._socket.close()


class ModelServer:
    """A pod: /readyz, and an answer in `chunks` server-sent events.

    `status` other than 200 makes it a bad model; `told` is what such an answer says in its headers.
    """

    def __init__(self, name: str, host: str, port: int) -> None:
        self.name, self.host, self.port = name, host, port
        self.ready, self.status, self.chunks, self.pause = True, 200, 3, 0.005
        self.told: dict[str, str] = {}
        self.dies = False  # under each request, once it has read it
        self.thought = threading.Event()  # before it, no answer begins
        self.thought.set()
        self.answered = self.cut = self.read = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._say(200 if outer.ready else 503, b"{}")

            def do_POST(self) -> None:
                outer.read += len(self.rfile.read(int(self.headers["content-length"])))
                outer.answered += 1
                outer.thought.wait()
                if outer.dies:
                    self.close_connection = True
                    return
                if outer.status != 200:
                    self._say(outer.status, b'{"error": {"message": "bad model"}}')
                    return
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                try:
                    for _ in range(outer.chunks):
                        self._chunk(f"data: {outer.name}\n\n".encode())
                        time.sleep(outer.pause)
                    self._chunk(b"data: [DONE]\n\n")
                    self.wfile.write(b"0\r\n\r\n")
                except OSError:
                    outer.cut += 1
                    self.close_connection = True

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

            def _say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                for name, value in outer.told.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128
            allow_reuse_address = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a router that closes its idle connections is no news

        self._server = Server((host, port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def drain(self) -> None:
        """As slmops-server on SIGTERM: not ready, but still answering."""
        self.ready = False

    def kill(self) -> None:
        """No new connections from this moment; answers that run are finished."""
        self.thought.set()
        self._server.shutdown()
        self._server.server_close()


class Router:
    """`python -m slmops_router` as a process."""

    def __init__(
        self,
        folder: Path,
        dns: Dns,
        routes: dict[str, Any] | None = None,
        reach: float = 0.5,
        drain: float = 0.5,
        ready: bool = True,
    ) -> None:
        self.folder, self.port, self.metrics_port, self.agent_port = folder, free_port(), free_port(), free_port()
        mounted = folder / "routes.json"
        if routes is not None:
            mounted.write_text(json.dumps(routes))
        self.command = [
            sys.executable,
            "-m",
            "slmops_router",
            "--routes",
            str(mounted),
            "--folder",
            str(folder / "run"),
            "--port",
            str(self.port),
            "--metrics-port",
            str(self.metrics_port),
            "--agent-port",
            str(self.agent_port),
            "--nameserver",
            dns.address,
            "--drain-seconds",
            str(drain),
            "--reach-seconds",
            str(reach),
        ]
        self.start(ready)

    def start(self, ready: bool = True) -> None:
        self.process = subprocess.Popen(
            self.command,
            env={
                "PATH": os.environ["PATH"] + ":/usr/sbin",
                "PYTHONPATH": str(ROOT / "images/router"),
                "SLMOPS_ROUTER_TOKEN": TOKEN,
            },
            stdout=(self.folder / "router.log").open("a"),
            stderr=subprocess.STDOUT,
        )
        what, path = ("ready", "/readyz") if ready else ("alive", "/livez")
        eventually(lambda: self.get(path)[0] == 200, f"router {what}, see {self.folder}/router.log")

    def wait_until_ready(self) -> None:
        eventually(lambda: self.get("/readyz")[0] == 200, "router ready")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def end(self) -> None:
        """At once: told twice."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)

    def call(
        self, method: str, path: str, body: object = None, token: str | None = TOKEN, host: str = "127.0.0.1"
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(host, self.agent_port, timeout=15)
        try:
            headers = {"authorization": f"Bearer {token}"} if token is not None else {}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        except OSError:
            return 0, None
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        return self.call("GET", path)

    def set(self, routes: dict[str, Any]) -> dict[str, Any]:
        status, said = self.call("PUT", "/routes", routes)
        assert status == 200, said
        return dict(said)

    def seen(self, revision: str) -> dict[str, Any]:
        return dict(self.get("/observed")[1]["revisions"].get(revision, {}))

    def ready(self, revision: str, count: int = 1) -> None:
        eventually(lambda: self.seen(revision).get("ready") == count, f"{count} ready servers of {revision}")

    def metrics(self, host: str = "127.0.0.1", path: str = "/metrics") -> str:
        connection = http.client.HTTPConnection(host, self.metrics_port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def servers(self) -> str:
        """The metrics of each pod, which are to be asked for."""
        return self.metrics(path="/metrics?scope=server")


def ask(
    port: int, session: str = "", connection: http.client.HTTPConnection | None = None, host: str = "127.0.0.1"
) -> tuple[str, str]:
    """One streamed completion: (revision that answered, "ok" or what went wrong)."""
    own = connection or http.client.HTTPConnection(host, port, timeout=20)
    headers = {"content-type": "application/json"} | ({"x-session-id": session} if session else {})
    try:
        own.request("POST", "/v1/chat/completions", json.dumps({"messages": [], "stream": True}), headers)
        answer = own.getresponse()
        body = answer.read()
        revision = answer.headers.get("x-slmops-revision", "")
        if answer.status != 200:
            return revision, f"{answer.status} {body[:120]!r}"
        return revision, "ok" if body.endswith(b"data: [DONE]\n\n") else f"cut after {body[-40:]!r}"
    except (OSError, http.client.HTTPException) as error:
        return "", f"{type(error).__name__}: {error}"
    finally:
        if connection is None:
            own.close()


class Load:
    """Clients in closed loops, half of them over kept connections, until `stop`."""

    def __init__(self, port: int, clients: int = 8) -> None:
        self._port, self._end = port, threading.Event()
        self._lock = threading.Lock()
        self.by_revision = Counter[str]()
        self.lost: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(n % 2 == 0,), daemon=True) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, kept: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20) if kept else None
        while not self._end.is_set():
            revision, how = ask(self._port, connection=connection)
            with self._lock:
                if how == "ok":
                    self.by_revision[revision] += 1
                else:
                    self.lost.append(how)
            if how != "ok" and connection is not None:
                connection.close()

    @property
    def sent(self) -> int:
        with self._lock:
            return sum(self.by_revision.values()) + len(self.lost)

    def more(self, count: int) -> None:
        """Wait until so many more requests have been answered."""
        goal = self.sent + count
        eventually(lambda: self.sent >= goal, f"{count} more requests", 60)

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(30)

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def routes(weights: dict[str, int], port: int, epoch: str = "", fallback: str = "", **servers: int) -> dict[str, Any]:
    """Routes JSON; revision `a` has the Service a.test."""
    return {
        "port": port,
        "epoch": epoch,
        "fallback": fallback or next(iter(weights), ""),
        "revisions": [
            {"revision": name, "host": f"{name}.test", "weight": weight, "servers": servers.get(name, 4)}
            for name, weight in weights.items()
        ],
    }
