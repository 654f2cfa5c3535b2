"""The little of ASGI that this server needs."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from slmops_server.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = b"application/json"
MAX_ID = 128


class DisconnectedError(Exception):
    """The client left."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower case) name."""
    return _first(scope["headers"], name)


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The client's X-Request-Id if it is a plain short word, else a new one."""
    given = _first(headers, b"x-request-id")
    if given and len(given) <= MAX_ID and given.isascii() and given.decode().isprintable():
        return given
    return secrets.token_hex(16).encode()


def _first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)


async def read_body(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """The whole body. ApiError 413 above `limit` bytes, 408 after that many seconds; DisconnectedError."""
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise DisconnectedError
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, "The body did not arrive in time.", code="request_timeout") from None


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(send: Send, status: int, body: bytes, kind: bytes = JSON, headers: Headers | None = None) -> None:
    """One whole response."""
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
