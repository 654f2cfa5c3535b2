"""The agent's HTTP side: PUT /routes and GET /observed for the operator, /livez and /readyz for the kubelet."""

import hmac
import json
import logging
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from slmops_router.control import Haproxy
from slmops_router.routes import BadRoutesError, parse
from slmops_router.runtime import RuntimeApiError

log = logging.getLogger(__name__)

BODY_MAX = 65_536  # bytes


class Agent(ThreadingHTTPServer):
    """Serves until shut down."""

    daemon_threads = True
    request_queue_size = 64
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, address: tuple[str, int], haproxy: Haproxy, token: str) -> None:
        super().__init__(address, Handler)
        self.haproxy, self.token, self.draining = haproxy, token, False

    def server_bind(self) -> None:
        """One socket for both families."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Agent
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds a client may stay silent

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
