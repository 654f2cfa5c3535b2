"""One HTTP exchange with somebody who is not trusted to be brief: bounded as a whole, in bytes and in time."""

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")  # httpx's names of these moments


class TooMuchError(Exception):
    """The body is longer than the limit; no more than that of it was read."""


@dataclass(frozen=True)
class Said:
    """An answer, with its whole body."""

    status: int
    body: bytes


def ask(
    client: httpx.Client,
    method: str,
    url: str,
    *,
    seconds: float,
    connect: float,
    limit: int,
    auth: Any = None,
    **more: Any,
) -> Said:
    """Ask, and read at most `limit` bytes within `seconds` of the beginning, headers and all.

    `connect`: seconds for the connection alone. `more`: json, data, headers, as httpx takes them. No encoding is taken:
    some kilobytes of gzip are gigabytes of text. Raises httpx.HTTPError, httpx.InvalidURL, TooMuchError.
    """
    deadline = _Deadline(seconds)
    headers = {**more.pop("headers", {}), "accept-encoding": "identity"}
    timeout = httpx.Timeout(seconds, connect=connect)
    try:
        request = client.build_request(
            method, url, headers=headers, timeout=timeout, extensions={"trace": deadline.watch}, **more
        )
        answer = client.send(request, stream=True, auth=httpx.USE_CLIENT_DEFAULT if auth is None else auth)
        try:
            said = Said(answer.status_code, _body(answer, limit))
        finally:
            deadline.stop()
            answer.close()
    except httpx.TimeoutException:
        raise
    except httpx.HTTPError as error:
        if deadline.over:
            raise httpx.ReadTimeout(_LATE) from error
        raise
    finally:
        deadline.stop()
    if deadline.over:  # a body without a length ends with its connection, whoever has closed that
        raise httpx.ReadTimeout(_LATE)
    return said


_LATE = "the whole answer takes too long"


def _body(answer: httpx.Response, limit: int) -> bytes:
    encoding = answer.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise httpx.DecodingError(f"the answer is encoded ({encoding[:40]}), which it was asked not to be")
    body = b""
    for chunk in answer.iter_bytes():
        body += chunk
        if len(body) > limit:
            raise TooMuchError
    return body


class _Deadline:
    """Cuts the connection when the time is over. httpx's timeouts are of one read each: every byte begins another."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, event: str, info: dict[str, Any]) -> None:
        """Told by httpx of every step of the exchange."""
        if event in CONNECTED:
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
                if self.over:
                    self._cut()

    def stop(self) -> None:
        """From now on the connection may be closed: its number is then another one's."""
        self._timer.cancel()
        with self._lock:
            self._socket = None

    def _end(self) -> None:
        with self._lock:
            self.over = True
            self._cut()

    def _cut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it is closed already
                # The one of TCP, for that of TLS takes from a read in another thread what it works with.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
