"""One client connection: uvicorn's protocol with the limits it lacks, so that no client can hold the server.

uvicorn has a keep-alive time, which starts after the first answer only, and a limit on concurrency, which refuses
probes as well and not in OpenAI's shape. Its h11 protocol limits the size of headers, the faster one over
httptools does not.

An Upgrade is ignored, as RFC 9110 (7.8) allows; Java's HttpClient asks for HTTP/2 with every request over a fresh
connection. httptools takes what follows such a head for another protocol, the body too, so it gets the head again
without that header.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from slmops_server.asgi import request_id
from slmops_server.errors import ApiError, bad_request

log = logging.getLogger(__name__)

MAX_HEAD = 32 << 10  # bytes of a request line and its headers
MAX_HEADERS = 100
SPARE = 64  # connections beyond the limit that are still served if they only ask for probes
LEAST = 4096  # bytes that a client takes within its time, if it reads at all
LINGER = 2.0  # seconds for a refused client to read why, before the connection is cut


class _Timer:
    """Calls once when it was not stopped in time; started again while it runs, it runs on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop, self._call = loop, call
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, self._fire)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._call()


@dataclass(frozen=True)
class Limits:
    """connections: how many at once. Seconds for a request to arrive, an answer to be taken, a connection to idle."""

    connections: int
    receive: float
    send: float
    idle: float
    refused: Callable[[ApiError], None]  # told of every refusal made here


class Connection(HttpToolsProtocol):
    """`limits` is set by `limited`."""

    limits: Limits

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.timeout_keep_alive = self.limits.idle  # type: ignore[assignment]  # int in uvicorn, for no reason
        self._head: int | None = None  # bytes of an unfinished head; None: not within a head
        self._arriving = False  # within a request
        self._upgrade = False  # the head asks for one
        self._refusal: ApiError | None = None
        self._untaken = 0  # bytes that waited to be sent when the time began
        self._refused = self._crowded = False
        self._receiving = _Timer(self.loop, self._too_slow)
        self._sending = _Timer(self.loop, self._not_taken)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Count it, and start its idle time."""
        super().connection_made(transport)
        surplus = len(self.connections) - self.limits.connections
        self._crowded = surplus > 0
        if surplus > SPARE:
            transport.abort()
            self.limits.refused(ApiError(499, "It gets no answer.", code="too_many_connections"))
            return
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is to be limited any more."""
        self._receiving.stop()
        self._sending.stop()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Measure what belongs to a head, and the time that a request takes to arrive."""
        if self._refused:
            return
        idle = self.timeout_keep_alive_task
        self._parse(data)
        self._stay_idle(self.loop.time() + self.timeout_keep_alive if idle is None else idle.when())
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD and not self._refused:
                self._refuse(_too_large())
        if not self._arriving:
            self._receiving.stop()
        elif not self._refused:
            self._receiving.start(self.limits.receive)

    def _parse(self, data: bytes) -> None:
        """As uvicorn does, but for upgrades."""
        self._unset_keepalive_if_required()
        rest: bytes | None = data
        try:
            while rest is not None:
                rest = self._feed(rest)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _feed(self, data: bytes) -> bytes | None:
        """What is to be parsed again, from a head that asked for an upgrade on."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as end:
            if not self._upgrade:  # CONNECT
                return None
            self._upgrade = False
            head = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
            return b"".join([head, *fields, b"\r\n", data[end.args[0] :]])
        return None

    def _stay_idle(self, until: float) -> None:
        """Any byte ends the idle time of uvicorn; blank lines and what is thrown away begin no request."""
        if self._arriving or self._refused or self.timeout_keep_alive_task is not None:
            return
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_at(until, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        """The parser's word for the first byte of a request."""
        super().on_message_begin()
        self._head, self._arriving = 0, True
        if self._crowded:
            self.scope["state"]["crowded"] = True

    def on_headers_complete(self) -> None:
        """Refuse a large head; else the application starts."""
        self._head = None
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD or len(self.headers) > MAX_HEADERS:
            self._refusal = _too_large()
            raise ValueError  # stops the parser; `_parse` then calls send_400_response
        if self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers):
            self._upgrade = True
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is here."""
        if self._upgrade:
            return
        self._arriving = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Where uvicorn ends what the parser refuses."""
        self._refuse(self._refusal or bad_request(msg, code="invalid_http"))

    def on_response_complete(self) -> None:
        """The connection may be closing now."""
        super().on_response_complete()
        self._closing()

    def shutdown(self) -> None:
        """The server ends: an idle connection is closed."""
        super().shutdown()
        self._closing()

    def timeout_keep_alive_handler(self) -> None:
        """Idle for too long."""
        super().timeout_keep_alive_handler()
        self._closing()

    def pause_writing(self) -> None:
        """The client is slower than its answer."""
        super().pause_writing()
        self._expect_taken()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._sending.stop()

    def _closing(self) -> None:
        """A closing transport first sends what it holds, and would wait for ever for a client that takes nothing."""
        if self.transport.is_closing():
            self._expect_taken()

    def _expect_taken(self) -> None:
        if not self._sending.running:
            self._untaken = self.transport.get_write_buffer_size()
            self._sending.start(self.limits.send)

    def _not_taken(self) -> None:
        if self.transport.get_write_buffer_size() <= self._untaken - LEAST and not self._refused:
            self._expect_taken()  # slow, but it reads
            return
        self.transport.abort()
        if self._refused:  # it had its time to read why
            return
        self.limits.refused(ApiError(499, "The client does not read its answer.", code="slow_reader"))

    def _too_slow(self) -> None:
        if self._head is not None:
            self._refuse(ApiError(408, "The request did not arrive in time.", code="request_timeout"))
        elif self.cycle is not None and self.cycle.response_complete:  # what still comes is thrown away: not for ever
            self.transport.abort()
        # else: the application reads the body, and limits the time itself

    def _refuse(self, error: ApiError) -> None:
        """Answer and close, without a request that the application could answer."""
        self._refused = True
        self._receiving.stop()
        self.limits.refused(error)
        if self.cycle is not None and not self.cycle.response_complete:  # would land in the middle of another answer
            self.transport.abort()
            return
        body = error.body()
        number = request_id(self.headers if self._arriving else ())
        head = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[error.status] + head % (len(body), number) + body)
        # Closed at once, unread bytes of the client would reset the connection before it has read the answer.
        self.transport.write_eof()
        self._sending.start(LINGER)


def limited(limits: Limits) -> type[Connection]:
    """The protocol class for uvicorn's `http`."""
    return type("LimitedConnection", (Connection,), {"limits": limits})


def _too_large() -> ApiError:
    return ApiError(
        431, f"The headers are larger than {MAX_HEAD} bytes or more than {MAX_HEADERS}.", code="headers_too_large"
    )
