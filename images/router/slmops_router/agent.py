"""The agent's HTTP side: PUT /routes and GET /observed for the operator, /livez and /readyz for the kubelet."""

import contextlib
import hmac
import io
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from slmops_router.control import Haproxy
from slmops_router.routes import BadRoutesError, parse
from slmops_router.runtime import RuntimeApiError

log = logging.getLogger(__name__)

HEAD_MAX = 16_384  # bytes of a request line and its headers
BODY_MAX = 65_536  # bytes
STRANGERS = 32  # connections at once without the token; the kubelet's probes need two


class Agent(ThreadingHTTPServer):
    """Serves until shut down.

    Where too many are connected, the oldest connection ends that has not shown the token: who holds many can so keep
    neither the operator nor the kubelet away.
    """

    daemon_threads = True
    request_queue_size = 64
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, address: tuple[str, int], haproxy: Haproxy, token: str) -> None:
        super().__init__(address, Handler)
        self.haproxy, self.token, self.draining = haproxy, token, False
        self._strangers: dict[socket.socket, None] = {}  # the oldest first
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own."""
        with self._lock:
            self._strangers[request] = None
            if len(self._strangers) > STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                with contextlib.suppress(OSError):  # it has gone by itself
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
        super().process_request(request, client_address)

    def trust(self, connection: socket.socket) -> None:
        """It has shown the token, or ends."""
        with self._lock:
            self._strangers.pop(connection, None)

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection."""
        self.trust(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up, or were made to."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def server_bind(self) -> None:
        """One socket for both families."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Reader(io.BufferedReader):
    """Lines of a head, which BaseHTTPRequestHandler lets be as large as 6 MiB: a few such would fill the memory."""

    left = HEAD_MAX

    def readline(self, size: int | None = -1) -> bytes:
        """Raises ConnectionAbortedError."""
        line = super().readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise ConnectionAbortedError("The headers are too large.")
        return line


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Agent
    rfile: _Reader
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds a client may stay silent

    def setup(self) -> None:
        """Limit what is read."""
        super().setup()
        self.rfile = _Reader(self.rfile.detach())

    def handle_one_request(self) -> None:
        """Each of a kept connection begins with a head."""
        self.rfile.left = HEAD_MAX
        super().handle_one_request()

    def do_GET(self) -> None:
        """Probes without, the rest with the token."""
        haproxy = self.server.haproxy
        if self.path == "/livez":
            self._say(200 if haproxy.alive() else 503, {"alive": haproxy.alive()})
        elif self.path == "/readyz":
            good = haproxy.ready() and not self.server.draining
            self._say(200 if good else 503, {"ready": good})
        elif self.path != "/observed":
            self._say(404, {"error": f"There is no {self.path}."})
        elif self._known():
            self._try(haproxy.observe)

    def do_PUT(self) -> None:
        """Set the routes."""
        if self.path != "/routes":
            self._say(404, {"error": f"There is no {self.path}."})
            return
        if not self._known():
            return
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > BODY_MAX:
            self.close_connection = True
            self._say(413, {"error": f"Send routes of at most {BODY_MAX} bytes with a Content-Length."})
            return
        body = self.rfile.read(int(length))

        def apply() -> dict[str, Any]:
            haproxy = self.server.haproxy
            haproxy.set(parse(body))
            log.info("Set routes weights=%s", {r.revision: r.weight for r in haproxy.routes.revisions})
            return haproxy.observe()

        self._try(apply)

    def _try(self, work: Callable[[], dict[str, Any]]) -> None:
        try:
            self._say(200, work())
        except BadRoutesError as error:
            self._say(400, {"error": str(error)})
        except RuntimeApiError as error:
            log.warning("Could not serve path=%s error=%s", self.path, error)
            self._say(503, {"error": str(error)})

    def _known(self) -> bool:
        given = self.headers.get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            self.server.trust(self.connection)
            return True
        self.close_connection = True  # an unread body must not be taken for the next request
        self._say(401, {"error": "Wrong or missing bearer token."})
        return False

    def _say(self, status: int, body: object) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        """Probes come every second: not worth a line."""
